"""mmsegmentation's side of `benchmarks.peer`: runs in an environment that holds mmsegmentation 1.x.

    PYTHON -I benchmarks/mmseg_side.py CONFIG WEIGHTS IMAGES HEIGHT WIDTH THREADS LABELS

CONFIG names one of its shipped PointRend configurations, WEIGHTS is a state dict, IMAGES normalised
float32 [1, 3, h, w] as .npy. Prints a line of JSON with the versions when it is ready; then, for
each line of standard input, predicts once and prints the milliseconds. The first prediction is kept
in LABELS, uint8 [HEIGHT, WIDTH] as .npy. Imports nothing of this project.
"""

import json
import os
import sys
import time
import types
from importlib import machinery, metadata, util
from pathlib import Path

import numpy as np
import torch


class AbsentOperators(types.ModuleType):
    """In place of mmcv's compiled operators, which mmcv-lite leaves out: PointRend calls none."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = machinery.ModuleSpec(name, None)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args, **kwargs):
            raise NotImplementedError(f"mmcv's compiled operator {name} is not installed")

        return absent


def build(config, weights):
    """Their model for one CPU, by the interface that its users have."""
    if util.find_spec("mmcv._ext") is None:
        sys.modules["mmcv._ext"] = AbsentOperators("mmcv._ext")
    import mmseg
    from mmengine.model import revert_sync_batchnorm
    from mmseg.apis import init_model

    folder = Path(mmseg.__file__).parent / ".mim" / "configs" / "point_rend"
    model = revert_sync_batchnorm(init_model(str(folder / f"{config}.py"), device="cpu"))
    model.load_state_dict(torch.load(weights, weights_only=True), strict=True)
    return model.eval()


def main():
    config, weights, images, height, width, threads, labels = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print is no answer
    torch.set_num_threads(int(threads))
    model = build(config, weights)
    inputs = torch.from_numpy(np.load(images))

    from mmseg.structures import SegDataSample

    shape = tuple(inputs.shape[2:])
    about = {"img_shape": shape, "pad_shape": shape, "ori_shape": (int(height), int(width))}

    @torch.no_grad()
    def predict():
        sample = model.predict(inputs, [SegDataSample(metainfo=about)])[0]
        return sample.pred_sem_seg.data[0].numpy()

    names = ("torch", "mmsegmentation", "mmengine", "mmcv", "mmcv-lite")
    present = {found.metadata["Name"] for found in metadata.distributions()}
    versions = {name: metadata.version(name) for name in names if name in present}
    print(json.dumps(versions), file=answers)
    for number, _ in enumerate(sys.stdin):
        start = time.perf_counter()
        found = predict()
        ms = 1e3 * (time.perf_counter() - start)
        if number == 0:
            np.save(labels, found.astype(np.uint8))
        print(json.dumps(ms), file=answers)


if __name__ == "__main__":
    main()
