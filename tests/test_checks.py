# SPDX-License-Identifier: BSD-3-Clause
"""Bad input: every error names the argument, what it got and what it must be; what is right passes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from cases import FORMS, make_case
from torch import randn

import dcd_kernels as dcd
from dcd_kernels import reference

MODULES = pytest.mark.parametrize("module", [dcd, reference], ids=["fused", "reference"])


def bad(form, changes, error, *words, **options):
    """A case of ``form`` with ``changes`` to its arguments, which must raise ``error`` with ``words``."""
    label = f"{form}: {', '.join(changes)} {' '.join(map(str, words[:1]))}"
    return pytest.param(form, changes, error, words, options, id=label)


# in_channels 6, out_channels 4 (depthwise 6), latent 3, batch 2, size (5, 4)
CONVOLUTION = [
    # rank
    bad("pointwise", {"input": randn(6, 5, 4)}, ValueError, "input", "batched", "4 dimensions", "(6, 5, 4)"),
    bad("pointwise", {"input": randn(6)}, ValueError, "input", "4 dimensions", "(6,)"),
    bad("pointwise", {"weight": randn(4, 6)}, ValueError, "weight", "4 dimensions", "(4, 6)"),
    # shape
    bad("pointwise", {"weight": randn(4, 5, 1, 1)}, ValueError, "weight", "(4, 6, 1, 1)", "(4, 5, 1, 1)"),
    bad("pointwise", {"p": randn(5, 3)}, ValueError, "p must", "(4, 3)", "(5, 3)"),
    bad("pointwise", {"p": randn(4, 2)}, ValueError, "p must", "(4, 3)", "(4, 2)"),
    bad(
        "pointwise",
        {"p": randn(4, 0), "phi": randn(2, 0, 0), "q": randn(6, 0)},
        ValueError,
        "p must",
        "L at least 1",
        "(4, 0)",
    ),
    bad("pointwise", {"q": randn(4, 3)}, ValueError, "q must", "(6, 3)", "(4, 3)"),
    bad("pointwise", {"q": randn(6)}, ValueError, "q must", "(6, 3)", "(6,)"),
    bad("pointwise", {"phi": randn(2, 3, 2)}, ValueError, "phi must", "(2, 3, 3)", "(2, 3, 2)"),
    bad("pointwise", {"phi": randn(1, 3, 3)}, ValueError, "phi must", "(2, 3, 3)", "(1, 3, 3)"),
    bad("pointwise", {"phi": randn(3, 3)}, ValueError, "phi must", "(2, 3, 3)", "(3, 3)"),
    bad("pointwise", {"phi": torch.tensor(1.0)}, ValueError, "phi must", "(2, 3, 3)", "()"),
    bad("pointwise", {"lam": randn(4)}, ValueError, "lam must", "(2, 4)", "(4,)"),
    bad("pointwise", {"lam": randn(2, 4, 1, 1)}, ValueError, "lam must", "(2, 4)", "(2, 4, 1, 1)"),
    bad("pointwise", {"bias": randn(5)}, ValueError, "bias must", "(4,)", "(2, 4)", "(5,)"),
    bad("pointwise", {"bias": randn(1, 4)}, ValueError, "bias must", "(2, 4)", "(1, 4)"),
    bad(
        "pointwise",
        {"residual": randn(2, 4, 4, 5)},
        ValueError,
        "residual must",
        "(2, 4, 5, 4)",
        "(2, 4, 4, 5)",
    ),
    bad(
        "centre", {"residual": randn(2, 4, 4, 5)}, ValueError, "residual must", "(2, 4, 5, 4)", "(2, 4, 4, 5)"
    ),
    bad("pointwise", {"residual": randn(4, 1, 1)}, ValueError, "residual must", "(2, 4, 5, 4)", "(4, 1, 1)"),
    bad("depthwise", {"r": randn(8, 3)}, ValueError, "r must", "(9, L_k)", "(8, 3)", "(3, 3)"),
    bad("depthwise", {"r": randn(9)}, ValueError, "r must", "(9, L_k)", "(9,)"),
    bad("depthwise", {"phi": randn(2, 2, 2)}, ValueError, "phi must", "(2, 3, 3)", "(2, 2, 2)"),
    bad("depthwise", {"p": randn(6, 2)}, ValueError, "p must", "(6, 3)", "(6, 2)"),
    bad("joint", {"phi": randn(2, 3, 3)}, ValueError, "phi must", "(2, 2, 3, 3)", "(2, 3, 3)"),
    bad("joint", {"phi": randn(2, 1, 3, 3)}, ValueError, "phi must", "(2, 2, 3, 3)", "(2, 1, 3, 3)"),
    bad("joint", {"phi": torch.tensor(0.0)}, ValueError, "phi must", "(2, 2, L, L)", "()"),
    bad("joint", {"q": randn(6, 2)}, ValueError, "q must", "(6, 3)", "(6, 2)"),
    bad("joint", {"p": randn(4, 2)}, ValueError, "p must", "(4, 3)", "(4, 2)"),
    # sizes of zero
    bad("pointwise", {"input": randn(2, 6, 0, 4)}, ValueError, "input", "only the batch", "(2, 6, 0, 4)"),
    bad("centre", {"input": randn(0, 6, 0, 4)}, ValueError, "input", "only the batch", "(0, 6, 0, 4)"),
    bad("pointwise", {"weight": randn(0, 6, 1, 1)}, ValueError, "weight", "zero", "(0, 6, 1, 1)"),
    bad("pointwise", {"input": randn(2, 0, 5, 4)}, ValueError, "only the batch of input", "(2, 0, 5, 4)"),
    bad("pointwise", {"phi": randn(2, 0, 0)}, ValueError, "phi must", "(2, 3, 3)", "(2, 0, 0)"),
    bad("depthwise", {"r": randn(9, 0)}, ValueError, "r must", "(9, 0)"),
    # kinds
    bad("pointwise", {"input": [[1.0]]}, TypeError, "input must be a torch.Tensor", "list"),
    bad("pointwise", {"weight": None}, TypeError, "weight must be a torch.Tensor", "NoneType"),
    bad("pointwise", {"p": np.zeros((4, 3), np.float32)}, TypeError, "p must be a torch.Tensor", "ndarray"),
    bad("pointwise", {"lam": 2.0}, TypeError, "lam must be a torch.Tensor or None", "float"),
    bad("pointwise", {"bias": True}, TypeError, "bias must be a torch.Tensor or None", "bool"),
    bad("joint", {"r": 3}, TypeError, "r must be a torch.Tensor or None", "int"),
    bad("pointwise", {"residual": 1}, TypeError, "residual must be a torch.Tensor or None", "int"),
    # dtype and device
    bad("pointwise", {"weight": randn(4, 6, 1, 1).double()}, TypeError, "weight", "float32", "float64"),
    bad("pointwise", {"p": randn(4, 3).half()}, TypeError, "p must", "float32", "float16"),
    bad("pointwise", {"q": randn(6, 3).double()}, TypeError, "q must", "float32", "float64"),
    bad("pointwise", {"phi": randn(2, 3, 3).bfloat16()}, TypeError, "phi must", "float32", "bfloat16"),
    bad("pointwise", {"lam": randn(2, 4).double()}, TypeError, "lam must", "float32", "float64"),
    bad("pointwise", {"bias": torch.zeros(4).int()}, TypeError, "bias must", "float32", "int32"),
    bad("centre", {"residual": randn(2, 4, 5, 4).half()}, TypeError, "residual must", "float32", "float16"),
    bad("depthwise", {"r": randn(9, 3).half()}, TypeError, "r must", "float32", "float16"),
    bad("pointwise", {"input": torch.zeros(2, 6, 5, 4).int()}, TypeError, "input", "floating point", "int32"),
    bad("pointwise", {"lam": randn(2, 4, device="meta")}, ValueError, "lam must be on cpu", "meta"),
    bad(
        "pointwise", {"weight": randn(4, 6, 1, 1, device="meta")}, ValueError, "weight must be on cpu", "meta"
    ),
    bad("depthwise", {"r": randn(9, 3, device="meta")}, ValueError, "r must be on cpu", "meta"),
    bad("pointwise", {"p": randn(4, 3)}, TypeError, "p must", "float16", "float32", dtype=torch.float16),
    bad(
        "pointwise", {"weight": randn(4, 6, 1, 1)}, TypeError, "weight must", "float32", dtype=torch.bfloat16
    ),
    bad("pointwise", {"lam": randn(2, 4).half()}, TypeError, "lam must", "float16", dtype=torch.bfloat16),
    bad("pointwise", {"residual": randn(2, 4, 5, 4)}, TypeError, "residual must", dtype=torch.bfloat16),
    # which factors go together
    bad("pointwise", {"phi": None}, ValueError, "phi is missing", "got p and q"),
    bad("pointwise", {"p": None}, ValueError, "p is missing", "got phi and q"),
    bad("pointwise", {"q": None}, ValueError, "q is missing", "got p and phi"),
    bad("joint", {"phi": None}, ValueError, "phi is missing", "got p and q and r"),
    bad("joint", {"p": None, "q": None}, ValueError, "p is missing", "got phi and r"),
    bad("depthwise", {"phi": None}, ValueError, "phi is missing", "got p and r"),
    bad("depthwise", {"r": None}, ValueError, "r is missing", "got p and phi"),
    bad("depthwise", {"p": None, "phi": None}, ValueError, "p is missing", "got r"),
    bad(
        "pointwise",
        {"p": randn(4), "phi": None, "q": None},
        ValueError,
        "p must",
        "(4,)",
        "bias is keyword-only",
    ),
    bad("pointwise", {"p": randn(4)}, ValueError, "p must", "(4, 3)", "(4,)", "bias is keyword-only"),
    bad("depthwise", {"p": randn(6)}, ValueError, "p must", "(6, 3)", "(6,)", "bias is keyword-only"),
    bad(
        "depthwise",
        {"r": None, "q": randn(6, 3)},
        ValueError,
        "q must be None",
        "depthwise",
        "(6, 3)",
        "Eq. 8",
    ),
    # groups and blocks
    bad("pointwise", {"groups": 4}, ValueError, "groups must", "divide in_channels 6", "got 4"),
    bad("pointwise", {"groups": 0}, ValueError, "groups must be positive", "got 0"),
    bad("pointwise", {"groups": -1}, ValueError, "groups must be positive", "got -1"),
    bad("pointwise", {"groups": "2"}, TypeError, "groups must be an integer", "'2'"),
    bad("pointwise", {"groups": 2}, ValueError, "weight must", "(4, 3, 1, 1)", "(4, 6, 1, 1)"),
    bad("joint", {"groups": 2, "weight": randn(4, 3, 3, 3)}, ValueError, "groups must be 1", "got 2"),
    bad("joint", {"phi": randn(2, 2, 2, 3, 3)}, ValueError, "phi must", "blocks do not go with joint"),
    bad("joint", {"q": None}, ValueError, "groups must be in_channels = 6", "got 1"),
    bad(
        "blocks",
        {"phi": randn(2, 4, 3, 3)},
        ValueError,
        "phi",
        "B = 4 blocks",
        "in_channels 6",
        "out_channels 4",
    ),
    bad("blocks", {"phi": randn(2, 0, 3, 3)}, ValueError, "phi", "B = 0 blocks"),
    bad("blocks", {"phi": randn(2, 2, 3, 2)}, ValueError, "phi must", "(2, 2, 2, 2)", "(2, 2, 3, 2)"),
    bad(
        "grouped",
        {"phi": randn(2, 3, 3)},
        ValueError,
        "phi must",
        "multiple of groups = 2",
        "(2, 3, 3)",
        "dcd_apply",
    ),
    bad(
        "grouped",
        {"phi": randn(2, 1, 3, 3)},
        ValueError,
        "phi must",
        "multiple of groups = 2",
        "(2, 1, 3, 3)",
    ),
    # geometry
    bad("centre", {"stride": 0}, ValueError, "stride must be positive", "got 0"),
    bad("pointwise", {"stride": (1, -1)}, ValueError, "stride must be positive", "(1, -1)"),
    bad("pointwise", {"stride": (1, 1, 1)}, ValueError, "stride must be one integer or 2", "(1, 1, 1)"),
    bad("pointwise", {"stride": 1.5}, TypeError, "stride must be an integer", "1.5"),
    bad("centre", {"padding": -1}, ValueError, "padding must be at least 0", "got -1"),
    bad("centre", {"padding": "full"}, ValueError, "padding must", "'same' or 'valid'", "'full'"),
    bad("centre", {"padding": "same", "stride": 2}, ValueError, "padding='same'", "stride 1", "(2, 2)"),
    bad("depthwise", {"dilation": 0}, ValueError, "dilation must be positive", "got 0"),
    bad("joint", {"dilation": (1, 2, 3)}, ValueError, "dilation must be one integer or 2", "(1, 2, 3)"),
    bad("centre", {"padding": 0, "dilation": 3}, ValueError, "7 positions", "only 5", "dilation 3"),
    bad("depthwise", {"padding": 0}, ValueError, "7 positions", "only 5", kernel=7, padding=3),
    bad(
        "centre",
        {"weight": randn(4, 6, 2, 3)},
        ValueError,
        "weight must have odd kernel",
        "(2, 3)",
        "dcd_apply",
    ),
    # activation
    bad("pointwise", {"activation": "gelu"}, ValueError, "activation must be one of", "'relu6'", "'gelu'"),
    bad("pointwise", {"activation": ["relu"]}, ValueError, "activation must be one of", "['relu']"),
    bad(
        "pointwise",
        {"activation": "relu"},
        TypeError,
        "activation must be None",
        "complex",
        dtype=torch.complex64,
    ),
]

LINEAR = [
    bad("linear", {"input": randn(6)}, ValueError, "input must be batched", "at least 2", "(6,)"),
    bad(
        "linear",
        {"weight": randn(4, 6, 1)},
        ValueError,
        "weight must be (out_channels, in_channels)",
        "(4, 6, 1)",
    ),
    bad("linear", {"weight": randn(4, 5)}, ValueError, "weight must", "(4, 6)", "(4, 5)"),
    bad("linear", {"p": randn(4), "phi": None, "q": None}, ValueError, "p must", "bias is keyword-only"),
    bad("linear", {"q": None}, ValueError, "q is missing", "got p and phi"),
    bad("linear", {"phi": randn(3, 3, 3)}, ValueError, "phi must", "(2, 3, 3)", "(3, 3, 3)"),
    bad("linear rows", {"lam": randn(2, 3, 4)}, ValueError, "lam must", "(2, 4)", "(2, 3, 4)"),
    bad("linear rows", {"residual": randn(2, 4)}, ValueError, "residual must", "(2, 2, 3, 4)", "(2, 4)"),
    bad("linear", {"input": torch.zeros(2, 6).long()}, TypeError, "input", "floating point", "int64"),
    bad("linear", {"input": 1.0}, TypeError, "input must be a torch.Tensor", "float"),
    bad("linear", {"input": randn(2, 0)}, ValueError, "weight must", "(4, 0)", "(4, 6)"),
    bad("linear", {"bias": randn(4).double()}, TypeError, "bias must", "float32", "float64"),
]

APPLY = [
    bad("apply", {"static": randn(2, 4)}, ValueError, "static must", "at least 3", "(2, 4)"),
    bad("apply", {"static": None}, TypeError, "static must be a torch.Tensor", "NoneType"),
    bad("apply", {"input": randn(2, 6, 5)}, ValueError, "input must", "(2, 4, 5, 4)", "(2, 6, 5)"),
    bad("apply", {"input": randn(1, 6, 5, 4)}, ValueError, "input must", "(2, 4, 5, 4)", "(1, 6, 5, 4)"),
    bad("apply", {"input": randn(2, 6, 0, 4)}, ValueError, "only the batch of input", "(2, 6, 0, 4)"),
    bad("apply", {"input": randn(2, 6, 5, 4).double()}, TypeError, "input must", "float32", "float64"),
    bad("apply", {"q": randn(4, 3)}, ValueError, "q must", "(6, 3)", "(4, 3)"),
    bad("apply", {"p": None}, ValueError, "p is missing", "got phi and q"),
    bad("apply", {"q": None}, ValueError, "phi must", "(2, 3, 6)", "(2, 3, 3)", "q is None"),
    bad("apply on a latent", {"phi": randn(2, 2, 3, 6)}, ValueError, "phi must", "(2, L, 6)", "(2, 2, 3, 6)"),
    bad("apply on a latent", {"p": randn(4)}, ValueError, "p must", "(4, 3)", "(4,)", "bias is keyword-only"),
    bad(
        "apply", {"residual": randn(2, 6, 5, 4)}, ValueError, "residual must", "(2, 4, 5, 4)", "(2, 6, 5, 4)"
    ),
    bad("apply", {"stride": 0}, ValueError, "stride must be positive", "got 0"),
    bad("apply", {"offset": (1, 2, 3)}, ValueError, "offset must be one integer or 2", "(1, 2, 3)"),
    bad("apply", {"offset": 0.5}, TypeError, "offset must be an integer", "0.5"),
    bad("apply blocks", {"phi": randn(2, 4, 3, 3)}, ValueError, "phi", "B = 4 blocks", "in_channels 6"),
    bad("apply", {"activation": "tanh"}, ValueError, "activation must be one of", "'tanh'"),
]


def changed(form, changes, options):
    case = make_case(form, **{"dtype": torch.float32, **options})
    tensors = {**case.tensors}
    for name, value in changes.items():
        (case.options if name in case.options else tensors)[name] = value
    case.tensors = tensors
    return case


def assert_names_it(raised, case, words) -> None:
    message = str(raised.value)
    assert message.startswith(f"{case.function}: ") or case.function in message
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


@MODULES
@pytest.mark.parametrize("form,changes,error,words,options", CONVOLUTION + LINEAR + APPLY)
def test_bad_call(module, form, changes, error, words, options):
    case = changed(form, changes, options)
    with pytest.raises(error) as raised:
        case.run(module)
    assert type(raised.value) is error
    assert_names_it(raised, case, words)


@pytest.mark.parametrize(
    "form,changes,error,words,options",
    [*CONVOLUTION[:36:12], *CONVOLUTION[40:100:12], LINEAR[3], APPLY[6], *CONVOLUTION[-5:-3]],
)
def test_bad_call_under_compile(form, changes, error, words, options, fresh_compiler):
    case = changed(form, changes, options)
    compiled = torch.compile(
        lambda tensors: case.with_tensors(tensors).run(dcd), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception) as raised:
        compiled(case.tensors)
    assert_names_it(raised, case, words)
    assert error.__name__ in str(raised.value)


@MODULES
def test_unbatched_input_says_what_to_do(module):
    with pytest.raises(ValueError, match=re.escape("unsqueeze(0)")):
        module.dcd_conv2d(randn(6, 5, 4), randn(4, 6, 1, 1))


@MODULES
def test_too_many_positional_arguments(module):
    x, w, p, phi, q = (make_case("pointwise").tensors[name] for name in ("input", "weight", "p", "phi", "q"))
    with pytest.raises(TypeError, match="positional"):
        module.dcd_conv2d(x, w, p, phi, q, randn(4))


WEIGHT = [
    ({"phi": None, "p": None, "q": None, "lam": None}, ValueError, ["phi or lam must", "both are None"]),
    ({"weight": randn(4)}, ValueError, ["weight must have at least 2", "(4,)"]),
    ({"lam": randn(3, 4)}, ValueError, ["lam must", "(2, 4)", "(3, 4)"]),
    ({"phi": torch.tensor(1.0)}, ValueError, ["phi must start with the batch"]),
    ({"groups": 2}, ValueError, ["p", "in_channels 12", "blocks"]),
    ({"groups": 3}, ValueError, ["groups must", "out_channels 4", "got 3"]),
    ({"q": None}, ValueError, ["q is missing", "got p and phi"]),
    ({"p": randn(4, 3).double()}, TypeError, ["p must", "float32", "float64"]),
    ({"weight": randn(4, 6, 2, 2)}, ValueError, ["odd kernel", "(2, 2)"]),
]


@pytest.mark.parametrize("changes,error,words", WEIGHT[:4] + WEIGHT[5:], ids=str)
def test_bad_weight(changes, error, words):
    case = make_case("pointwise", dtype=torch.float32)
    arguments = {name: case.tensors[name] for name in ("weight", "p", "phi", "q", "lam")}
    with pytest.raises(error) as raised:
        reference.dcd_weight(**{**arguments, **changes})
    missing = [word for word in ["dcd_weight: ", *words] if word not in str(raised.value)]
    assert not missing, f"{missing} not in: {raised.value}"


# What is right and looks odd


@MODULES
@pytest.mark.parametrize("form", FORMS)
def test_float32_coefficients_beside_half_precision(form, module):
    case = make_case(form, bias="shared")
    for dtype in (torch.float16, torch.bfloat16):
        assert case.converted(dtype, torch.float32).run(module).dtype == dtype


@MODULES
@pytest.mark.parametrize(
    "name,value",
    [
        ("stride", [1, 1]),
        ("stride", (1,)),
        ("stride", torch.Size((1, 1))),
        ("stride", np.int64(1)),
        ("padding", [0, 0]),
        ("padding", "same"),
        ("padding", "valid"),
        ("dilation", (3, 7)),
        ("dilation", [2]),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["pointwise", "centre"])
def test_spellings_of_the_same_geometry(form, name, value, module):
    case = make_case(form, kernel=1, padding=0)
    expected = case.run(module)
    case.options[name] = value
    assert torch.allclose(case.run(module), expected, rtol=1e-12)


@MODULES
def test_one_channel_is_any_form(module):
    shape = {"in_channels": 1, "out_channels": 1, "latent": 1, "latent_kernel": 1}
    for form in ("pointwise", "depthwise", "joint", "centre"):
        case = make_case(form, **shape)
        assert torch.allclose(case.run(module), case.truth())


@MODULES
def test_meta_tensors_give_the_shape(module):
    case = make_case("centre", device="meta", stride=2)
    assert case.run(module).shape == (2, 4, 3, 2)


@MODULES
@pytest.mark.parametrize("form", ["pointwise", "depthwise", "joint", "centre", "linear rows", "apply"])
def test_layouts_without_strides(form, module):
    case = make_case(form, dtype=torch.float32, bias="shared", residual=True)
    for name in case.names:
        for other in (torch.Tensor.to_sparse, torch.Tensor.to_mkldnn):
            try:
                changed = other(case.tensors[name])
            except RuntimeError:  # mkldnn knows neither every rank nor every processor
                continue
            layout = str(changed.layout).removeprefix("torch.")
            with pytest.raises(TypeError, match=rf"{case.function}: {name} must be .*{layout}; to_dense"):
                case.with_tensors({name: changed}).run(module)
