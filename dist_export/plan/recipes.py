"""What becomes of a planned tensor beyond copying and casting: codes of quantised weights, and their scales.

A recipe is a frozen value in the plan; `dist_export.convert.encode` carries it out. Scalars come from the run's scale
table by the names of Megatron's modules; scales of rows and blocks are too many for a table and are read beside the
weights that they belong to.
"""

from __future__ import annotations

from enum import Enum
from fractions import Fraction

from msgspec import Struct

from dist_export.checkpoint.quantizer_names import ModuleName
from dist_export.tensors.boxes import Shape
from dist_export.tensors.dtypes import DType
from dist_export.tensors.views import View

Groups = tuple[tuple[ModuleName, ...], ...]
"""Modules by the entry of a scale tensor that they share; an entry is the largest of its modules' values."""


class Codes(Enum):
    """A form of quantised elements: (name, weight elements per stored row, per stored column)."""

    E4M3 = ("FP8 E4M3", 1, 1)
    INT8 = ("INT8", 1, 1)
    INT4 = ("INT4, two rows per byte, even row low", 2, 1)
    E2M1 = ("FP4 E2M1, two columns per byte, even column low", 1, 2)
    E2M1_SCALES = ("E4M3 scales of FP4 blocks of 16 columns", 1, 16)
    INT4_WORDS = ("INT4 + 8, eight columns per 32-bit word, first column lowest", 1, 8)
    WEIGHTS = ("weights times the factors of their columns", 1, 1)
    STORED_E4M3 = ("FP8 E4M3 as it is stored", 1, 1)
    STORED_INT8 = ("INT8 as it is stored", 1, 1)
    STORED_INT4 = ("INT4 as it is stored, put in order: two rows per byte, even row low", 2, Fraction(1, 2))
    STORED_INT4_WORDS = ("INT4 as it is stored, put in order: eight columns per word, first column lowest", 1, 4)

    WEIGHTS_OF_INT8 = ("weights out of stored INT8, times the factors of their columns", 1, 1)
    WEIGHTS_OF_INT4 = ("weights out of stored INT4, times the factors of their columns", 1, Fraction(1, 2))

    @property
    def rows(self) -> int:
        """Source rows per stored row."""
        return int(self.value[1])

    @property
    def columns(self) -> int | Fraction:
        """Source columns per stored column. A source column of stored INT4 is a byte, two columns of the weight."""
        found: int | Fraction = self.value[2]
        return found

    @property
    def are_stored(self) -> bool:
        """Whether the checkpoint has the codes, not the weights."""
        return self in (Codes.STORED_E4M3, Codes.STORED_INT8, Codes.STORED_INT4, Codes.STORED_INT4_WORDS, *OUT_OF_CODES)

    @property
    def are_weights(self) -> bool:
        """Whether what is written keeps its precision."""
        return self in (Codes.WEIGHTS, *OUT_OF_CODES)


OUT_OF_CODES = (Codes.WEIGHTS_OF_INT8, Codes.WEIGHTS_OF_INT4)
"""Where a layout has no place for the factor of activations, and the weights were stored as codes."""


class ScaleForm(Enum):
    """What a quantiser's tensor holds of a row or a block. A weight of zeros has scale 1, whatever is stored of it."""

    AMAX = "amax"
    """Divided by the largest code it is the scale."""
    SCALE = "scale"
    """Of weights that are stored as codes: amax / largest code, rounded to the model's element type, or 0."""
    RECIPROCAL = "reciprocal of the scale"
    """Of weights that are stored as INT4: largest code / amax, rounded to the model's element type, or infinity."""


class TableScales(Struct, frozen=True):
    """Weight scales of whole modules: amax / divisor in float32."""

    groups: Groups
    """One per slice along the leading dim of a stacked weight, or a single one."""
    divisor: float


class StoredScales(Struct, frozen=True):
    """Scales of rows or blocks of columns: the stored amax / divisor in float32, or what `form` says."""

    view: View
    """``[..., rows, 1]`` or ``[..., rows, blocks]`` of a quantiser's tensor, placed like the weight."""
    dtype: DType
    divisor: float
    form: ScaleForm = ScaleForm.AMAX


class Factors(Struct, frozen=True):
    """A factor of the activations of a linear, one per channel."""

    view: View
    """``[channels]`` of a quantiser's tensor."""
    dtype: DType


class Smoothing(Struct, frozen=True):
    """What weights are divided by before they are quantised: each column by its own number.

    The quotient is rounded to the weights' own element type, as a checkpoint that ModelOpt smoothed stores it
    (modelopt/torch/quantization/model_calib.py, `apply_pre_quant_scale_and_smooth`).
    """

    view: View
    """``[columns]``, or ``[slices, columns]`` of a stacked weight."""
    dtype: DType


class Encoded(Struct, frozen=True):
    """Codes of a weight."""

    codes: Codes
    scales: TableScales | StoredScales | Factors
    """Factors are those of columns, which `Codes.WEIGHTS` takes."""
    smoothing: Smoothing | None = None
    """None: the weights are stored as they are quantised."""
    factors: Factors | None = None
    """Of columns, which weights `OUT_OF_CODES` take over."""

    def stored_shape(self, shape: Shape) -> Shape:
        """The shape of what is written for weights of `shape`."""
        return (*shape[:-2], shape[-2] // self.codes.rows, shape[-1] // self.codes.columns)

    def faults(self, shape: Shape) -> list[str]:
        """Why weights of `shape` have no such codes."""
        blocks = 1
        if isinstance(self.scales, StoredScales):
            blocks = self.scales.view.shape[-1]
        faults = []
        if shape[-2] % self.codes.rows:
            faults.append(f"{shape[-2]} rows cannot be stored two in a byte")
        if shape[-1] % max(self.codes.columns, blocks):
            faults.append(f"{shape[-1]} columns do not divide into blocks")
        return faults


class Scalars(Struct, frozen=True):
    """Scales out of the table, one per group."""

    groups: Groups
    divisor: float
    shape: Shape
    of_inputs: bool = False
    """Scales of the modules' activations, not of their weights."""
    at_least: float = 0.0
    reciprocal: bool = False
    """1 / scale is written."""

    def stored_shape(self, shape: Shape) -> Shape:
        """Its own."""
        return self.shape


class Constant(Struct, frozen=True):
    """Values that are known already."""

    values: tuple[float, ...]
    shape: Shape

    def stored_shape(self, shape: Shape) -> Shape:
        """Its own."""
        return self.shape


class Stored(Struct, frozen=True):
    """A quantiser's tensor in the order of the weight that it belongs to, divided in float32 if a divisor is given."""

    view: View
    dtype: DType
    divisor: float | None
    squeezed: bool = False
    """Without its last dim, which has size 1."""
    times: Factors | None = None
    """What its rows are multiplied by: the factor of the linear behind, which this one takes over."""
    form: ScaleForm | None = None
    """What is stored of scales; None: no scales, but numbers that are written as they are."""

    @property
    def is_as_it_is(self) -> bool:
        """Whether the numbers are only cast."""
        return self.divisor is None and self.form is None and self.times is None

    def stored_shape(self, shape: Shape) -> Shape:
        """The view's."""
        return self.view.shape[:-1] if self.squeezed else self.view.shape


class Folded(Struct, frozen=True):
    """A norm's weight or bias that takes over the factor of the activations behind it: (w [+ 1]) x factor [- 1].

    The product is rounded once, to the element type of the export.
    """

    factor: View
    factor_dtype: DType
    zero_centered: bool = False

    def stored_shape(self, shape: Shape) -> Shape:
        """That of the norm."""
        return shape


class Absorbed(Struct, frozen=True):
    """Queries of latent attention that take the keys' projection in, so that scores need the latents alone.

    The view holds the queries' rows, head by head: ``num_nope`` without rotation, then those that are rotated. Of each
    head ``[kv_lora_rank, inputs]`` is stored, the sum over the unrotated rows d of key[d, k] x query[d, q], and then
    its rotated rows as they are. Both weights are cast to the element type of the export first.
    """

    keys: View
    """Unrotated keys of the same heads, ``[heads x num_nope, kv_lora_rank]``."""
    keys_dtype: DType
    num_heads: int
    num_nope: int

    def stored_shape(self, shape: Shape) -> Shape:
        """That of all heads together."""
        num_rotated = shape[0] // self.num_heads - self.num_nope
        return self.num_heads * (self.keys.shape[1] + num_rotated), shape[1]


Recipe = Encoded | Scalars | Constant | Stored | Folded | Absorbed

FOLLOWS_WEIGHT = (Encoded,)
"""Recipes carried out on tiles of the weight as they are read; of the others all but `Absorbed` make small tensors of
their own."""


def described(recipe: Recipe) -> str:
    """For people: what is made, of whose scales."""
    if isinstance(recipe, Encoded):
        scales = recipe.scales
        if isinstance(scales, Factors) or recipe.codes.are_stored:
            return str(recipe.codes.value[0])
        of = _modules(scales.groups) if isinstance(scales, TableScales) else "stored amax of rows or blocks"
        return f"{recipe.codes.value[0]}, amax / {scales.divisor:g}: {of}"
    if isinstance(recipe, Absorbed):
        return "queries times keys, head by head"
    if isinstance(recipe, Scalars):
        return f"{'activation' if recipe.of_inputs else 'weight'} amax / {recipe.divisor:g}: {_modules(recipe.groups)}"
    if isinstance(recipe, Stored) and recipe.form in (ScaleForm.SCALE, ScaleForm.RECIPROCAL):
        return f"stored {recipe.form.value}"
    if isinstance(recipe, Stored):
        return "stored factor" if recipe.divisor is None else f"stored amax / {recipe.divisor:g}"
    if isinstance(recipe, Folded):
        return "times the factor of the activations behind it"
    return "as given"


def _modules(groups: Groups) -> str:
    names = [str(module) for group in groups for module in group]
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
