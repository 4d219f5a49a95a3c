"""The affine grids as lines: their searches and refits, compiled and in torch."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lfmq.quant.affine.refit import refit_rows
from lfmq.quant.affine.search import MOVES, SPANS, search_rows
from lfmq.quant.affine.torch_body import refit_bias, refit_zero, search_bias, search_zero, sums
from lfmq.quant.grid import F32, Form
from lfmq.quant.line.state import Line, line_bodies

T = torch.Tensor


class AffineLine(Line):
    """A grid with offsets: floats of ``affine_bias``, zero points of ``affine_zero_point``."""

    def search(self, w: Any, h: F32, form: Form, scale: F32, offset: F32, *target: Any) -> bool:
        """Choose scales and offsets and round."""
        spans, moves = SPANS[form.grid, form.bits], MOVES[form.grid, form.bits]
        bias, top = _is_bias(form), np.float32(form.highest_code)
        return bool(search_rows(w, h, bias, top, spans, moves, scale, offset, *target))

    def refit(self, gradient: F32, h: F32, level: F32, form: Form, scale: F32, offset: F32,
              change: F32) -> None:  # fmt: skip
        """Refit scales, offsets and codes."""
        bias, top = _is_bias(form), np.float32(form.highest_code)
        refit_rows(gradient, h, level, bias, top, scale, offset, change)

    def search_torch(self, x: T, h: T, form: Form) -> tuple[T, T]:
        """Scales and offsets [N] of a group [N, g]."""
        spans = SPANS[form.grid, form.bits].tolist()
        moves = torch.from_numpy(MOVES[form.grid, form.bits]).to(x.device)
        search = search_bias if _is_bias(form) else search_zero
        return search(x, h, form.highest_code, spans, moves)

    def refit_torch(
        self, gradient: T, h: T, level: T, form: Form, scale: T, offset: T
    ) -> tuple[T, T]:
        """Scales and offsets [N] of least loss, where that is less."""
        moved = level if _is_bias(form) else level - offset[:, None]
        refit = refit_bias if _is_bias(form) else refit_zero
        return refit(scale, offset, *sums(moved, gradient, h), form.highest_code)

    def base(self, scale: Any, offset: Any, form: Form) -> Any:
        """What code 0 stands for."""
        return offset if _is_bias(form) else -(scale * offset)

    def stored_offset(self, offset: F32, form: Form) -> NDArray[Any]:
        """A float16, or the zero point's code."""
        return offset.astype(np.float16 if _is_bias(form) else np.uint8)


def _is_bias(form: Form) -> bool:
    return form.grid == "affine_bias"


BODIES = line_bodies(AffineLine())
