"""How the page looks and what moves in it; neither holds anything from outside."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1b1f24; --quiet: #5b636d; --line: #dfe3e8; --box: #f5f7f9;
  --coarse: #a3abb5; --refined: #1f6fc5; --right: #1f6fc5; --wrong: #d96a00; --on: #fff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --ink: #e4e8ec; --quiet: #9aa4af; --line: #2d333b; --box: #1c2127;
    --coarse: #79828d; --refined: #5aa5f5; --right: #5aa5f5; --wrong: #f59a3c; --on: #0c1014;
  }
}

* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; overflow-wrap: anywhere; }
h3 span { margin-left: .6em; font-weight: 400; color: var(--quiet); }
a { color: var(--refined); }
.note { max-width: 46rem; margin: .5rem 0 1rem; color: var(--quiet); font-size: .9rem; }
.facts, .legend {
  display: flex; flex-wrap: wrap; gap: .2rem 1.1rem;
  margin: 0; padding: 0; list-style: none; color: var(--quiet); overflow-wrap: anywhere;
}
nav {
  display: flex; flex-wrap: wrap; gap: .25rem 1.25rem;
  margin-top: 1rem; padding: .5rem 0; border-block: 1px solid var(--line);
}
:focus-visible { outline: 3px solid var(--refined); outline-offset: 2px; border-radius: 2px; }

.scroll { position: relative; overflow: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td {
  padding: .3rem 0 .3rem .75rem; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap;
}
th { font-weight: 400; }
th:first-child { padding-left: 0; text-align: left; }
thead th { color: var(--quiet); font-size: .85rem; vertical-align: bottom; }
.summary th:first-child { padding-right: 1rem; white-space: normal; }
.summary tbody tr:first-child :is(th, td) { font-size: 1.2rem; font-weight: 600; }
.confusions :is(th, td):nth-child(2) { text-align: left; }
.confusions :is(th:first-child, td:nth-child(2)) { white-space: normal; }
.confusions thead th { min-width: 4rem; white-space: normal; }

.columns {
  display: grid; gap: 0 2.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr));
}
.columns > div { min-width: 0; }
.long .scroll { max-height: 45rem; border-block: 1px solid var(--line); }
.long thead th { position: sticky; top: 0; background: var(--paper); }
.bars { width: 100%; font-size: .9rem; }
.bars :is(th, td) { padding: .25rem 0 .25rem .6rem; }
.bars th:first-child { padding-left: 0; }
.bars tbody th { max-width: 11rem; white-space: normal; overflow-wrap: break-word; }
.name { display: flex; align-items: baseline; line-height: 1.25; }
.bars td:nth-child(2) { width: 100%; min-width: 4rem; }
.bar { display: block; border-left: 1px solid var(--quiet); }
.bar i { display: block; height: .5rem; min-width: 1px; }
.bar i + i { margin-top: 1px; }
.bar .coarse, .key.coarse::before { background: var(--coarse); }
.bar .refined, .key.refined::before { background: var(--refined); }
.key::before {
  content: ""; display: inline-block; width: .6em; height: .6em; margin-right: .3em;
}
small { margin-left: .5em; color: var(--quiet); font-size: .85em; }
.swatch {
  display: inline-block; flex: none; width: .75em; height: .75em; margin-right: .45em;
  border: 1px solid var(--quiet); border-radius: 2px;
}
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }

.example { display: grid; gap: 1rem; }
.example > div { min-width: 0; }
img { display: block; width: 100%; height: auto; background: var(--box); }
.small { image-rendering: pixelated; }
figure { margin: 0; }
figcaption, .legend { color: var(--quiet); font-size: .85rem; }
.legend { margin-top: .5rem; }
.tiles {
  display: grid; gap: .75rem; align-content: start;
  grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr));
}
.detail { grid-column: 1 / -1; }
.tiles button {
  display: block; width: 100%; padding: 0; border: 0; background: none; cursor: zoom-in;
}
dialog { max-width: none; max-height: none; padding: 0; border: 0; background: none; }
dialog::backdrop { background: #000d; }
dialog img { width: 96vw; height: 96vh; object-fit: contain; background: none; cursor: zoom-out; }
.slider { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; }
.layer { position: relative; }
.tag {
  position: absolute; left: .5rem; bottom: .5rem; padding: .05rem .5rem;
  border-radius: 3px; background: #000b; color: #fff; font-size: .85rem;
}
@media (max-width: 36rem) {
  .bars, .confusions, thead th { font-size: .8rem; }
  .bars td:nth-child(2) { min-width: 2.5rem; }
  :is(.bars, .confusions) :is(th, td):not(:first-child) { padding-left: .4rem; }
  .confusions thead th { min-width: 0; }
}
@media (min-width: 60rem) { .example { grid-template-columns: 3fr 2fr; } }

/* on paper and without the script, the pictures stay beside each other */
@media screen {
  .js .slider { display: block; position: relative; }
  .js .layer + .layer { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--at)); }
  .js .layer + .layer .tag { left: auto; right: .5rem; }
  .js .slider::before, .js .slider::after {
    position: absolute; z-index: 1; left: var(--at); translate: -50% 0; pointer-events: none;
    background: #fff; box-shadow: 0 0 3px #000a;
  }
  .js .slider::before { content: ""; top: 0; bottom: 0; width: 2px; }
  .js .slider::after {
    content: "\\2194\\fe0e"; top: calc(50% - 1rem); width: 2rem; height: 2rem;
    border-radius: 50%; color: #222; font-size: 1.2rem; line-height: 2rem; text-align: center;
  }
  .slider input {
    position: absolute; z-index: 2; inset: 0; width: 100%; height: 100%; margin: 0;
    opacity: 0; cursor: ew-resize; appearance: none; touch-action: pan-y;
  }
  .slider input::-webkit-slider-thumb { width: 1px; height: 100%; appearance: none; }
  .slider input::-moz-range-thumb { width: 1px; height: 100%; border: 0; }
  .slider:has(:focus-visible) { outline: 3px solid var(--refined); outline-offset: 2px; }
}

.beside { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.beside > div { max-width: 100%; }
.matrix { display: block; font-size: 12px; }
.matrix text { fill: var(--ink); dominant-baseline: central; }
.matrix .row { text-anchor: end; }
.matrix .ground { fill: var(--box); stroke: var(--line); }
.matrix g text { font-size: 11px; text-anchor: middle; pointer-events: none; }
.matrix g .strong { fill: var(--on); }
.matrix .right rect { fill: var(--right); }
.matrix .wrong rect { fill: var(--wrong); }
.matrix g:hover rect { stroke: var(--ink); stroke-width: 1.5; }
.readout {
  display: block; position: sticky; z-index: 1; top: 0; min-height: 1.5em;
  background: var(--paper); font-weight: 600; overflow-wrap: anywhere;
}

dl { margin: 0 0 1rem; }
dl div { display: grid; grid-template-columns: 6rem 1fr; gap: 1rem; padding: .2rem 0; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: .875em/1.5 ui-monospace, Menlo, Consolas, monospace; }
pre { overflow: auto; padding: .75rem; background: var(--box); }
@media print {
  nav, .readout { display: none; }
  article { break-inside: avoid; }
  .long .scroll { overflow: visible; max-height: none; }
}
"""

SCRIPT = """
"use strict";
document.documentElement.classList.add("js");
for (const slider of document.querySelectorAll(".slider")) {
  const input = slider.querySelector("input");
  const move = () => slider.style.setProperty("--at", input.value + "%");
  input.addEventListener("input", move);
  input.hidden = false;
  move();
}
const dialog = document.body.appendChild(document.createElement("dialog"));
dialog.addEventListener("click", () => dialog.close());
for (const button of document.querySelectorAll(".tiles button")) {
  button.addEventListener("click", () => {
    dialog.replaceChildren(button.firstChild.cloneNode());
    dialog.showModal();
  });
}
const readout = document.querySelector(".readout");
for (const kind of ["pointerover", "click"]) {
  document.querySelector(".matrix").addEventListener(kind, (event) => {
    const title = event.target.parentNode.querySelector(":scope > title");
    readout.textContent = title ? title.textContent : "";
  });
}
"""
