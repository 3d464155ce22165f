"""The peers, each behind the same face: a job in, a call to time out.

Runs in the environment of one peer, so everything is imported where it is used. A builder does what
a user of that engine does once (loading, packing, compiling) and pins it to the asked threads.
Nothing is checked here; the parent compares results with its own reference.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Arrays = Sequence[np.ndarray]
IR_VERSION, OPSET = 7, 13  # what DeepSparse 1.8 reads


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        arrays: For `kind` "onnx" the inputs in the order of the graph; for a layer `x`, `weight`,
            `bias` and for training `grad`, the gradient of the output.
        kind: `linear`, `conv` or `onnx`.
        threads: Threads the engine may use.
        model: The ONNX file; None for a layer.
        stride: Of a convolution, both directions.
        padding: Of a convolution, all sides.
        groups: Of a convolution.
        training: Whether to run forward and backward; SparseProp only.
    """

    arrays: dict[str, np.ndarray]
    kind: str
    threads: int
    model: str | None = None
    stride: int = 1
    padding: int = 0
    groups: int = 1
    training: bool = False

    def inputs(self) -> list[np.ndarray]:
        """What is fed to the graph."""
        return [self.arrays["x"]] if self.model is None else list(self.arrays.values())


def onnxruntime(job: Job) -> tuple[Callable[[], object], str]:
    """ONNX Runtime, CPU provider."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    with _graph(job) as path:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {i.name: x for i, x in zip(session.get_inputs(), job.inputs(), strict=True)}
    return lambda: session.run(None, feeds), ort.__version__


def openvino(job: Job) -> tuple[Callable[[], object], str]:
    """OpenVINO in float32, which is not its default where the CPU has bfloat16."""
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": job.threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # the process may be bound to some cores already
    }
    with _graph(job) as path:
        compiled = ov.Core().compile_model(path, "CPU", settings)
    request, inputs = compiled.create_infer_request(), job.inputs()

    def call():
        found = request.infer(inputs, share_inputs=True, share_outputs=True)
        return [found[output] for output in compiled.outputs]

    return call, ov.__version__.split("-")[0]


def deepsparse(job: Job) -> tuple[Callable[[], object], str]:
    """DeepSparse; it finds the zeros in the graph by itself."""
    os.environ["NM_DISABLE_ANALYTICS"] = "1"
    # Bound threads could share a core with whatever else runs there, and no other side is bound.
    os.environ["NM_BIND_THREADS_TO_CORES"] = "0"
    import deepsparse as engine

    inputs = job.inputs()
    with _graph(job) as path:
        compiled = engine.Engine(model=path, batch_size=len(inputs[0]), num_cores=job.threads)
    return lambda: compiled.run(inputs, val_inp=False), engine.__version__


def sparseprop(job: Job) -> tuple[Callable[[], object], str]:
    """SparseProp; convolutions by the faster of its two kernels, as its own converter chooses."""
    import torch

    torch.set_num_threads(job.threads)
    tensors = {name: torch.from_numpy(array) for name, array in job.arrays.items()}
    if job.kind == "linear":
        return _sparseprop_call(job, tensors), "0.1.14"
    if job.kind == "conv" and job.groups > 1:
        raise ValueError(f"sparseprop: expected a convolution without groups, got {job.groups}")
    if job.kind == "conv":
        calls = [_sparseprop_call(job, tensors, over_on) for over_on in (False, True)]
        return min(calls, key=_quick_time), "0.1.14"
    raise ValueError(f"sparseprop: expected a linear or conv layer, got {job.kind}")


def _sparseprop_call(job: Job, tensors: dict, *over_on: bool) -> Callable[[], object]:
    import torch
    from sparseprop.modules.conv2d import SparseConv2d
    from sparseprop.modules.linear import SparseLinear

    x, bias = tensors["x"], torch.nn.Parameter(tensors["bias"])
    if job.kind == "linear":
        layer = SparseLinear(tensors["weight"], bias)
    else:
        layer = SparseConv2d(tensors["weight"], bias, job.padding, job.stride, *over_on)
    if job.training:
        leaves = [x.requires_grad_(), layer.W_val, layer.bias]
        return lambda: torch.autograd.grad(layer(x), leaves, tensors["grad"])

    def call():
        with torch.inference_mode():
            return [layer(x)]

    return call


def _quick_time(call: Callable[[], object]) -> float:
    import time

    call()
    start = time.perf_counter()
    for _ in range(3):
        call()
    return time.perf_counter() - start


class _graph:
    """The ONNX file of a job; for a layer one is written for the time of loading."""

    def __init__(self, job: Job):
        self.job, self.folder = job, None

    def __enter__(self) -> str:
        if self.job.model is not None:
            return self.job.model
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "layer.onnx"
        write_layer(self.job, path)
        return str(path)

    def __exit__(self, *error) -> None:
        if self.folder is not None:
            self.folder.cleanup()


def write_layer(job: Job, path: Path) -> None:
    """One layer with bias as an ONNX graph of fixed shapes."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    if job.kind == "linear":
        node = helper.make_node("Gemm", ["x", "weight", "bias"], ["y"], transB=1)
    else:
        size = list(job.arrays["weight"].shape[2:])
        node = helper.make_node("Conv", ["x", "weight", "bias"], ["y"], kernel_shape=size,
                                strides=[job.stride] * 2, pads=[job.padding] * 4,
                                group=job.groups)  # fmt: skip

    def value(name: str, shape: list[int]):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    x = job.arrays["x"]
    constants = [numpy_helper.from_array(job.arrays[name], name) for name in ("weight", "bias")]
    inputs, outputs = [value("x", list(x.shape))], [value("y", [len(x), *[None] * (x.ndim - 1)])]
    graph = helper.make_graph([node], "layer", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = IR_VERSION
    onnx.save(onnx.shape_inference.infer_shapes(model), str(path))


ENGINES: dict[str, Callable[[Job], tuple[Callable[[], object], str]]] = {
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "deepsparse": deepsparse,
    "sparseprop": sparseprop,
}
