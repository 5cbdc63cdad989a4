# SPDX-License-Identifier: BSD-3-Clause
"""optimize_for_inference: a trained network as one call into the compiled kernels."""

from __future__ import annotations

import copy
import operator
import re
import threading

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy

from .. import extension
from ..arguments import check_module
from ..backends import selection
from ..explain import Explanation, explain
from ..interop import report
from ..interop.layers import DROPOUTS, are_watched

if extension.LOADED:
    from ..ops.autograd import is_traced
    from .examples import examples_like
    from .plan import Plan
    from .watch import Watch

# where the compiled op says that a check failed: a function, a file and a line
_OP_ERROR = re.compile(r"^\w+, \S*ops_network\.cpp:\d+, ")
_MOST_REFUSED = 8  # a network that takes none of these in another batch takes none
_EXAMPLE_SIZES = (64, 224, 32)
_BACKENDS = ("auto", "cpu")
_DTYPES = (torch.float32, torch.bfloat16)


def optimize_for_inference(model: nn.Module) -> OptimizedNetwork:
    r"""A copy of ``model`` that computes the same: inference on the CPU, in one call if possible.

    In the dtype of its parameters, float32 or bfloat16: images and the weights of ``model.bfloat16()`` lie in
    memory as bfloat16, sums, λ, Φ and biases are float32, and each layer rounds its result once. Norms, which
    are folded before weights are rounded, may be left in float32.

    Norms are folded into the layers before them, and activations, sums and the pooling for the next layer's
    branch are computed where their input is made; a pointwise layer and the depthwise one behind it run row
    by row, so that what is between them, the largest images of a MobileNet, is never in memory as a whole.
    Dynamic layers take the cheaper order of the product for each size of image. In float32, 3×3 layers of
    stride 1 between 32 channels or more are computed by Winograd's F(2×2, 3×3), where an infinite input gives
    NaN. A network is one operator where every node of its data flow (torch.fx) has a kernel; nodes without
    one run as they are written, between pieces. :func:`dcd_kernels.report` of the result says which, and why.

    There are kernels for the networks of :mod:`dcd_kernels.models`, for those in the released form,
    accelerated or not, and for static ones: 2-D convolutions (dense or depthwise) and linear layers, static
    or DCD in every form of the residual, batch norms, ReLU, ReLU6, SiLU, Hardswish, sums, max pooling, means
    over the image, dropout. Left as written are groups that are not depthwise, 1-D and 3-D layers, other
    padding modes than zeros, branches that pool to unequal numbers of rows and columns, and layers that are
    called with a residual or a condition.

    Args:
        model: a module that takes one tensor, (N, C, H, W) or (N, C), in eval mode. It is left as it is.

    Returns:
        A module with the same state_dict, keys and submodules. Batch, height, width and memory format may
        change from call to call; several threads may call it at once. Weights may be edited in place, loaded
        or moved: what was derived from them is derived again (unless they are edited through NumPy, or
        through the ``data`` of a buffer). The structure is fixed: after replacing a submodule or changing an
        attribute of one, optimise again. Results carry no gradient.

        To find out what it computes, copies of the network are called with random numbers. Where torch.fx
        does not see all that a forward does (attributes that it sets, autocast inside of it, questions to the
        type of its input), it runs as it is written.

        A call that the kernels do not serve (another device or dtype, an input that requires a gradient,
        autocast, torch.compile and torch.export, ``use_backend('reference')``) runs the network as it was
        written.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model``, or a module in it, is in training mode, or has parameters without a size. A
            call raises RuntimeError where the result, one of its children or a dropout in it was put into
            training mode, or the input has other channels than the network.

    Source: paper, Section 5.5 (the protocol), Eq. 6 to 9, Fig. 4b (the layers); Lavin and Gray 2016, section
    4.1 (Winograd's filtering).
    """
    check_module("optimize_for_inference", model)
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        which = repr(training) if training else "the model itself"
        raise ValueError(
            "optimize_for_inference: model must be in eval mode, whose norms can be folded; "
            f"{which} is in training mode: call model.eval() first"
        )
    lazy = next((name for name, tensor in model.named_parameters() if is_lazy(tensor)), None)
    if lazy is not None:
        raise ValueError(f"optimize_for_inference: {lazy!r} has no size yet: call the model once first")
    if isinstance(model, OptimizedNetwork):
        return copy.deepcopy(model)
    with torch.inference_mode(False):  # in which tensors count no versions
        return OptimizedNetwork(copy.deepcopy(model))


class OptimizedNetwork(nn.Module):
    """What :func:`optimize_for_inference` returns: the network ``written``, and how it runs."""

    def __init__(self, written: nn.Module) -> None:
        super().__init__()
        self.training = False
        # in a tuple, which keeps it from being a child besides
        self._written = (written,)
        self._begin()
        self._make_early()

    @property
    def written(self) -> nn.Module:
        """The network as it is written; it shares its parameters with this one."""
        return self._written[0]

    @property
    def plan(self) -> Plan | None:
        """How it runs; None before the first call where no example of an input could be guessed."""
        return self._plan

    @property
    def refuses(self) -> bool:
        """Whether it was called with inputs like which no examples can be made: it ran as it is written."""
        return bool(self._refused)

    def _begin(self) -> None:
        self._plan = None
        # kinds of inputs that the network takes in no other batch
        self._refused: set[tuple] = set()
        self._lock = threading.Lock()
        self._watch = Watch(self.written) if extension.LOADED else None
        # the same parameters, buffers and children, in the same dictionaries, so that all keys are the same
        for place in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[place] = self.written.__dict__[place]
        self._modal = _with_modes(self.written)

    def _make_early(self) -> None:
        """So that a report can be made, and the first call is as fast as the others."""
        channels = None if not extension.LOADED else _input_channels(self.written)
        dtype = _dtype_of(self.written)
        if channels is None or dtype not in _DTYPES:
            return
        for size in _EXAMPLE_SIZES:
            like = torch.empty(2, channels, size, size, dtype=dtype, device="cpu")
            examples = examples_like(self.written, like)
            if examples:
                self._plan = Plan(self.written, self._watch, examples)
                return

    def forward(self, *args, **kwargs):
        if self.training:
            raise _in_training()
        if len(args) != 1 or kwargs or not _is_served(args[0]):
            return self.written(*args, **kwargs)
        if any(map(_is_training, self._modal)):
            raise _in_training()
        plan = self._plan
        if plan is None or not plan.is_current():
            plan = self._renew(args[0])
            if plan is None:
                result = self.written(*args)
                self._refused.add(_kind(args[0]))  # not where it raises
                return result
        # a layer of an image takes no vector, and none takes another dtype, and the other way round
        if args[0].dim() != plan.rank or args[0].dtype is not plan.dtype:
            return self.written(*args)
        try:
            return plan(args[0])
        except RuntimeError as error:
            message = _OP_ERROR.sub("OptimizedNetwork: ", str(error))
            if message == str(error):
                raise
            raise RuntimeError(message) from error

    # the network may have state, hooks or formats of its own

    def state_dict(self, *args, **kwargs) -> dict:
        return self.written.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self.written.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.written._load_from_state_dict(*args, **kwargs)

    def explain(self, *args, **kwargs) -> Explanation:
        """What a call with these arguments runs: :func:`dcd_kernels.explain`."""
        if len(args) != 1 or kwargs or not _is_served(args[0]):
            return explain(self.written, *args, **kwargs)
        self(args[0])
        return Explanation((), str(report(self)))

    def _renew(self, input: Tensor) -> Plan | None:
        """The plan for the weights that there are now; None where no examples like ``input`` are accepted."""
        with self._lock:  # whoever comes second finds what the first one made
            plan = self._plan
            if plan is not None and (plan.is_current() or plan.keeps_structure()):
                self._plan = plan = plan if plan.is_current() else plan.renewed()
                return plan
            if _kind(input) in self._refused or len(self._refused) == _MOST_REFUSED:
                return None
            examples = examples_like(self.written, input)
            if examples:
                self._plan = Plan(self.written, self._watch, examples)
            return self._plan if examples else None

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        del state["_plan"], state["_refused"], state["_lock"], state["_watch"], state["_modal"]
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._begin()

    def _get_name(self) -> str:
        return f"OptimizedNetwork[{type(self.written).__name__}]"


def _kind(input: Tensor) -> tuple:
    return (input.dtype, *input.shape)


_is_training = operator.attrgetter("training")


def _in_training() -> RuntimeError:
    return RuntimeError(
        "OptimizedNetwork is for inference and was put into training mode, or a module in it was: call "
        "eval(), or train the model that it was made from"
    )


def _with_modes(network: nn.Module) -> tuple[nn.Module, ...]:
    """The modules whose mode is looked at in every call: all would take a tenth of a small network's time.

    Its children, which somebody may put into training mode by mistake, and dropouts, of which somebody may
    want the noise.
    """
    dropouts = (module for module in network.modules() if isinstance(module, DROPOUTS))
    return (*dict.fromkeys((*network.children(), *dropouts)),)


def _is_served(input: object) -> bool:
    return (
        extension.LOADED
        and type(input) in (Tensor, nn.Parameter)
        and input.dtype in _DTYPES
        and input.is_cpu
        and input.dim() in (2, 4)
        and input.layout is torch.strided
        and not (input.requires_grad and torch.is_grad_enabled())
        and not is_traced()
        and forward_ad._current_level < 0
        and not torch._C._len_torch_dispatch_stack()  # a mode counts, or changes, what torch runs
        and not are_watched()
        and not torch.is_autocast_enabled("cpu")
        and selection.current() in _BACKENDS
        and not selection.is_observed()
    )


def _dtype_of(network: nn.Module) -> torch.dtype:
    """The dtype of the images that ``network`` takes, by its first parameter."""
    dtypes = (tensor.dtype for tensor in network.parameters() if tensor.is_floating_point())
    return next(dtypes, torch.float32)


def _input_channels(network: nn.Module) -> int | None:
    """Channels of the images that the first convolution of ``network`` reads."""
    for module in network.modules():
        if hasattr(module, "in_channels") and hasattr(module, "kernel_size"):
            return module.in_channels if len(module.kernel_size) == 2 else None
    return None


def entries_of(network: OptimizedNetwork) -> list[tuple[str, str, bool, str]]:
    """(name, kind, taken, reason) of each node of the data flow that is a module or runs as it is written."""
    plan = network.plan
    if plan is None:
        reason = extension.REASON or "no input has been seen yet"
        if network.refuses:
            reason = "it takes no other batch than that of a call, so that nothing is known of the next one"
        return [("", type(network.written).__name__, False, reason)]
    found = []
    for node in plan.captured.graph.nodes:
        taken = node in plan.facts.kinds and node not in plan.facts.reasons
        if node.op in ("placeholder", "output", "get_attr") or (taken and node.op != "call_module"):
            continue
        kind = type(plan.captured.module(node)).__name__ if node.op == "call_module" else _target(node)
        found.append((plan.captured.name(node), kind, taken, plan.reason(node)))
    return found


def _target(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
