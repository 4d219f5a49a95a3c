"""All grids by name; a new one is a folder and a line here."""

from lfmq.quant.affine.spec import AFFINE_BIAS, AFFINE_ZERO_POINT
from lfmq.quant.codebook.spec import CODEBOOK
from lfmq.quant.grid import Grid
from lfmq.quant.kquant.spec import KQUANT
from lfmq.quant.symmetric.spec import SYMMETRIC

_ALL = (
    SYMMETRIC,
    AFFINE_BIAS,
    AFFINE_ZERO_POINT,
    KQUANT,
    CODEBOOK,
)

GRIDS: dict[str, Grid] = {grid.name: grid for grid in _ALL}
# Words of older recipes and files of statistics, and what they are now.
ALIASES: dict[str, str] = {word: grid.name for grid in _ALL for word in grid.aliases}
