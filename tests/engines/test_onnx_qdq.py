"""Static and per-token inputs in ONNX: the file computes what the codes say, in integer kernels."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import tiny
from flyweight.engines import onnxruntime as engine
from flyweight.engines.onnx_integer import Draft
from flyweight.engines.onnx_qdq import rounded_linear
from flyweight.engines.onnx_rows import whole
from flyweight.errors import ExportError
from flyweight.methods.quantize import quantize
from flyweight.methods.quantize.grid import Grid, quantize_weight
from flyweight.models.activations import round_static, round_tokens, rounding
from flyweight.models.bundle import Codes
from flyweight.models.codes import dequantize, described
from flyweight.models.load import load
from flyweight.parity import check
from flyweight.settings import QuantizeSettings
from flyweight.tasks import task_named
from solver_cases import context

WIDTH, OUT = 24, 10


def linear(grid: Grid, smooth: bool = False, outliers: tuple[int, ...] = (), static: bool = True) -> Codes:
    """Codes of a random weight, with what `Codes` may carry."""
    torch.manual_seed(0)
    weight = torch.randn(OUT, WIDTH)
    factors = torch.rand(WIDTH) + 0.5 if smooth else None
    scaled = weight if factors is None else weight * factors
    places = torch.tensor(outliers) if outliers else None
    if places is not None:
        scaled = scaled.index_fill(1, places, 0)
    codes = quantize_weight(scaled, grid)
    values = None if places is None else weight[:, places].contiguous()
    scale, zero = (torch.tensor([0.03]), torch.tensor([120], dtype=torch.uint8)) if static else (None, None)
    parts = {"smooth": factors, "outliers": places, "outlier_values": values}
    return described(
        Codes(codes.info, codes.codes, codes.scale, codes.zero_point, **parts, input_scale=scale, input_zero_point=zero)
    )


def slow(codes: Codes, x: torch.Tensor, activations: str) -> torch.Tensor:
    """The formula of `Codes`, in float64."""
    smooth = torch.ones(WIDTH) if codes.smooth is None else codes.smooth
    inner = x * (1 / smooth)
    static = activations == "static"
    inner = round_static(inner, codes.input_scale, codes.input_zero_point) if static else round_tokens(inner)
    weight = (dequantize(codes) * smooth).double()
    inner = inner.double()
    if codes.outliers is not None:
        inner[:, codes.outliers] = 0
        inner = inner.clone()
    answer = inner @ weight.t()
    if codes.outliers is not None:
        answer += x[:, codes.outliers].double() @ codes.outlier_values.double().t()
    return answer


def run(codes: Codes, x: torch.Tensor, activations: str, bias: np.ndarray | None = None) -> np.ndarray:
    draft = Draft()
    whole(
        draft, rounded_linear(draft, "x", "weight", codes, activations, "y", None if bias is None else ("bias", bias))
    )
    value = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
        for name, size in (("x", WIDTH), ("y", OUT))
    ]
    graph = helper.make_graph(draft.nodes, "one", value[:1], value[1:], list(draft.initializers.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})[0]


GRIDS = [
    Grid(8),
    Grid(8, granularity="tensor"),
    Grid(8, "asymmetric"),
    Grid(4),
    Grid(3, "asymmetric"),
    Grid(2, "ternary"),
    Grid(1, "binary"),
]


@pytest.mark.parametrize("activations", ["static", "token"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.bits}-{g.scheme}-{g.granularity}")
@pytest.mark.parametrize(
    "extra", [{}, {"smooth": True}, {"smooth": True, "outliers": (0, 7, 23)}], ids=["plain", "smooth", "outliers"]
)
def test_computes_the_formula(activations, grid, extra):
    if grid.scheme == "binary" and "outliers" in extra:
        pytest.skip("a binary grid has no zero for outlier channels")
    codes = linear(grid, static=activations == "static", **extra)
    x = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(5))
    wanted = slow(codes, x, activations).numpy()
    assert np.abs(run(codes, x, activations) - wanted).max() < 2e-5 * np.abs(wanted).max()


def test_a_token_of_zeros_and_what_leaves_the_grid():
    codes = linear(Grid(8), static=False)
    x = torch.zeros(3, WIDTH)
    x[1] = 1e-42  # denormal: no scale can be divided by
    x[2] = 1e30
    found = run(codes, x, "token")
    assert np.isfinite(found).all()
    assert (found[0] == 0).all()
    static = linear(Grid(8))
    assert np.allclose(run(static, x, "static"), slow(static, x, "static"), rtol=1e-5)


def test_groups_are_refused():
    with pytest.raises(ExportError, match="scale per tensor or channel"):
        rounded_linear(Draft(), "x", "weight", linear(Grid(4, "symmetric", "group", 8)), "static", "y")


@pytest.mark.parametrize(
    "settings",
    [{"activations": "static"}, {"activations": "token"}, {"activations": "static", "bits": 4, "outliers": 4}],
    ids=str,
)
def test_a_model_runs_in_integer_kernels_and_shares_inputs(tmp_path, settings):
    bundle = load(str(tiny.write(tmp_path / "m", "bert", labels=("a", "b"))), task_named("text-classification"))
    texts = bundle.encoder._replace(truncate=True).examples(tiny.SENTENCES)
    found = quantize(bundle, QuantizeSettings(**settings), context(tmp_path, texts, task_named(bundle.task)))
    entry = engine.export(found, tmp_path / "out")
    assert entry.precision == f"int8-{settings['activations']}"
    check(found, tmp_path / "out", entry, [texts.batch(range(i, i + 5), 0) for i in (0, 5, 10)])

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "out" / entry.file), options, providers=["CPUExecutionProvider"])
    ran = [node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node]
    layers = found.model.config.num_hidden_layers
    heads = 2 if settings["activations"] == "token" else 0  # pooler and classifier
    static = settings["activations"] == "static" and "bits" not in settings
    assert ran.count("QGemm" if static else "MatMulIntegerToFloat") == 6 * layers + heads
    written = [node.op_type for node in onnx.load(str(tmp_path / "out" / entry.file)).graph.node]
    assert written.count("QuantizeLinear") == 4 * layers + heads  # one for q, k and v together


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-9, 1e-5])
def test_a_bias_beside_rows_of_next_to_nothing_is_what_torch_simulates(granularity, size):
    """In steps of a row's scale such a bias is far beyond int32, and a row of zeros has no scale of its own."""
    codes = linear(Grid(8, "symmetric", granularity))
    weight = dequantize(codes)
    weight[:4] = size * torch.randn(4, WIDTH)
    made = quantize_weight(weight, Grid(8, "symmetric", granularity))
    shift = torch.randn(WIDTH) / 4
    codes = described(
        Codes(
            made.info, made.codes, made.scale, made.zero_point,
            input_scale=codes.input_scale, input_zero_point=codes.input_zero_point, input_shift=shift,
        )
    )  # fmt: skip
    module = torch.nn.Linear(WIDTH, OUT)
    with torch.no_grad():
        module.weight.copy_(dequantize(codes))
        module.bias.copy_(torch.linspace(-0.7, 0.9, OUT))
    x = torch.randn(50, WIDTH)
    with torch.no_grad(), rounding(module, codes, "static"):
        wanted = module(x)
    exact = (round_static(x - shift, codes.input_scale, codes.input_zero_point) + shift) @ module.weight.t()
    assert (wanted - exact - module.bias).abs().max() < (2e-2 if granularity == "tensor" else 1e-3)
    found = run(codes, x, "static", module.bias.detach().numpy())
    np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-4, atol=2e-5)
