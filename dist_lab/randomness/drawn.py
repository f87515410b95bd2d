"""Refuses random numbers that are not exact, with exact dropout or a fixed order of additions.

Any form of dropout may hide in a forward: `dropout_p` of scaled_dot_product_attention, F.dropout,
noise. It asks torch's, Python's or NumPy's generator, so its mask differs in every layout. Its name
does not tell. So the first forward in training compares the state of the generators before and
after each module, and the error names the innermost one. Later forwards, 2, 4, 8 and so on, compare
it around the model only: a layer may draw in some steps only.

A draw may have no effect: layers of transformers draw a number to compare it with layerdrop=0. So a
forward that has drawn is computed again from other states, the same on every rank, and refused only
if its output changes.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dist_lab.errors import UserError
from dist_lab.randomness.generators import GENERATORS
from dist_lab.step.hooks import ModuleHook, map_tensors, tensors_in
from dist_lab.torch_private import backward_number

TRIALS = 8  # a layer left out with probability 0.1 is found with 0.57, and again in later forwards
Again = Callable[[], AbstractContextManager[None]]


class RefuseDraws:
    """Watches the forwards of a model, or of one stage of a pipeline.

    Args:
        names: module -> its name, for the modules inside.
        remember: called as remember(module) before its forward; returns what to enter for another.
    """

    def __init__(
        self,
        root: nn.Module,
        names: Mapping[nn.Module, str],
        remember: Callable[[nn.Module], Again] = lambda module: nullcontext,
    ) -> None:
        self.root, self.names, self.remember, self.forwards = root, names, remember, 0
        self.states: list[tuple[list[object], Again]] = []  # at the start of each running forward
        self.is_trial = False  # a forward is computed again
        self.inner: list[RemovableHandle] = []
        for module in root.modules():
            if module is not root and module in names:
                self.inner += self._hook(module)
        self._hook(root)
        self.after: list[object] = []  # states after the root's forward, before its hooks
        root.register_forward_hook(ModuleHook(self._leave_hooks))

    def _hook(self, module: nn.Module) -> list[RemovableHandle]:
        enter, leave = ModuleHook(self._enter), ModuleHook(self._leave)
        return [
            module.register_forward_pre_hook(enter),
            # First, while a unit still holds its full parameters. Other hooks are in the outer one.
            module.register_forward_hook(leave, with_kwargs=True, prepend=True),
        ]

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module is self.root:
            self.states.clear()  # the last forward may have raised
            if self.root.training and backward_number() == -1:
                self.forwards += 1
        is_due = self._is_due()
        self.states.append((_states(), self.remember(module)) if is_due else ([], nullcontext))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before, again = self.states.pop() if self.states else ([], nullcontext)
        drew = before and self._is_due() and _states() != before
        if drew and self._depends_on_draws(module, args, kwargs, again):
            self._refuse(module)
        if module is self.root and self.root.training and not self.is_trial:
            for handle in self.inner:
                handle.remove()
            self.inner.clear()
            self.after = _states() if self._is_due() else []

    def _leave_hooks(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.after and self._is_due() and _states() != self.after:
            self._refuse(module)

    def _refuse(self, module: nn.Module) -> None:
        name = self.names.get(module) or "the model"
        raise UserError(
            f"{name} ({type(module).__name__}) draws random numbers in its forward, by dropout "
            "inside attention (dropout_p), F.dropout or other noise, which differ in every "
            'layout; set that to 0, use an nn.Dropout module with dropout="exact", or leave out '
            "exact dropout and reduce_order"
        )

    def _is_due(self) -> bool:
        often = self.forwards & (self.forwards - 1) == 0
        return self.root.training and often and not self.is_trial and backward_number() == -1

    def _depends_on_draws(self, module: nn.Module, args: Any, kwargs: Any, again: Again) -> bool:
        """Whether other draws give another output. Keeps buffers and generators as they are.

        Trials are compared with each other and not with the real output: so all ranks, which have
        other states but the same seeds, come to the same answer after the same collectives.
        """
        buffers = [(m._buffers, dict(m._buffers)) for m in module.modules() if m._buffers]
        self.is_trial, first = True, self.forwards * TRIALS
        try:
            outputs: list[Tensor] = []
            for seed in range(first, first + TRIALS):
                for held, originals in buffers:  # backward may need the originals as they are
                    held.update(map_tensors(torch.clone, originals))
                with torch.no_grad(), other_draws(seed), again():
                    copies, named = map_tensors(torch.clone, [args, dict(kwargs)])
                    found = list(tensors_in(module.forward(*copies, **named)))
                outputs = outputs or found
                if not found or len(found) != len(outputs):
                    return True
                if not all(map(torch.equal, found, outputs)):
                    return True
        except Exception:  # it cannot be computed again, so nothing is known
            return True
        finally:
            self.is_trial = False
            for held, originals in buffers:
                held.update(originals)
        return False


@contextmanager
def other_draws(seed: int) -> Iterator[None]:
    """In the block all generators start from this seed; afterwards they are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _states() -> list[object]:
    states = [state() for state in GENERATORS.values()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state().numpy().tobytes())
    return states
