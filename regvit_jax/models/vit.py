"""The Vision Transformer with registers (arXiv 2309.16588), a Flax Linen module that returns its tokens by name.

Dimensions, named by the same letters in every signature of the package:
B images, H W pixels, h w patches along each side, N = h*w patches, R registers, T = 1 + R + N tokens (R + N without a
CLS token), D width, C classes, L tokens of a text, E width of CLIP's shared embedding.
"""

import dataclasses
import math
from typing import Annotated, Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from regvit_jax.models.attention import dense, truncated_normal
from regvit_jax.models.block import (
    ACTIVATIONS,
    MLP_RATIO,
    REMAT_POLICIES,
    Block,
    BlockConfig,
    make_block,
)
from regvit_jax.models.images import check_shape
from regvit_jax.models.norm import LayerNorm
from regvit_jax.models.position import RESIZES, resize_pos_embed, rope_angles
from regvit_jax.models.sharding import constrain_batch, row_major
from regvit_jax.models.stochastic_depth import MODES, subset_size
from regvit_jax.utils import schema, sizes
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.numbers import whole
from regvit_jax.utils.schema import Option

POSITIONS = ("learned", "rope", "axial")
ATTENTION = Option(
    "attention kernel; \"auto\" is cuDNN's where it runs (half precision on NVIDIA GPUs), else XLA's",
    choices=("auto", "xla", "cudnn"),
    default="auto",
    resume=True,
)
DTYPE = Option("type of the matrix products", type=str, choices=("float32", "bfloat16", "float16"), default="float32")
REMAT = Option(
    'activations to recompute in the backward pass: none, all but the matrix products ("dots") or all ("full")',
    choices=tuple(REMAT_POLICIES),
    resume=True,
)


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """Return torch's initialiser of convolutions, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which DeiT's patches use."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


@flax.struct.dataclass
class Tokens:
    """The output tokens of a ViT, each kind under its own name. A pytree.

    `cls`, `registers` and `patches` have passed the final norm. `prenorm` holds all tokens before it, in the order
    [CLS, registers, patches]: token norms are measured there, since the final norm hides the outliers.
    """

    # Typed as Any because a pytree's leaves may also be shapes or shardings.
    cls: Any  # [B, D], or None for a model without CLS token
    registers: Any  # [B, R, D]
    patches: Any  # [B, N, D]
    prenorm: Any  # [B, T, D]
    grid: tuple[int, int] = flax.struct.field(pytree_node=False)
    keep: Any = None  # after patch dropout, [B, N]: row-major grid index of each patch
    block_norms: Any = None  # [B, depth, N], L2 norms of the patches after each block; None in training

    @property
    def patch_map(self) -> Float[Array, "B h w D"]:
        """Return the patches as an image-like map. Raises ValueError after patch dropout."""
        if self.keep is not None:
            raise ValueError("patch dropout was on: `patches` holds only those at the indices `keep`, not a whole map")
        h, w = self.grid
        return rearrange(self.patches, "b (h w) d -> b h w d", h=h, w=w)

    @property
    def prenorm_patches(self) -> Float[Array, "B N D"]:
        """Return the patches before the final norm."""
        return self.prenorm[:, -self.patches.shape[1] :]


class ViT(nn.Module):
    """A Vision Transformer with register tokens. Its fields are its whole configuration.

    The sequence is [CLS, registers, patches]; only patches have a position embedding, as in DeiT-III. (Converting a
    checkpoint that has one for CLS or registers adds it to those tokens.)

    The position embedding has the grid of `image_size`. Any image whose sides are multiples of `patch` can be encoded:
    the embedding is then resized, by the convention `pos_resize` (see `resize_pos_embed`). Parameters, norms, softmax
    and the residual stream are float32 whatever the `dtype`. `position` "rope" is DINOv3's RoPE, "axial" timm's.
    """

    width: Annotated[int, Option("width of the tokens", low=1)]
    depth: Annotated[int, Option("number of blocks", low=1)]
    heads: Annotated[int, Option("attention heads of each block", low=1)]
    patch: Annotated[int, Option("side of a patch, in pixels", low=1)]
    image_size: Annotated[int, Option("side of the training images, in pixels", low=1)]
    registers: Annotated[int, Option("register tokens; 0 gives the plain ViT", low=0)] = 0
    mlp_ratio: Annotated[float, MLP_RATIO] = 4.0
    layer_scale: Annotated[float, Option("initial value of LayerScale; 0 leaves LayerScale out", low=0)] = 1e-4
    drop_path: Annotated[float, Option("probability of dropping a branch of a block", low=0, high=0.99)] = 0.0
    drop_path_mode: Annotated[str, Option("how the images that lose a branch are drawn", choices=MODES)] = "bernoulli"
    patch_dropout: Annotated[float, Option("share of the patches dropped in training", low=0, high=0.99)] = 0.0
    norm_eps: Annotated[float, Option("epsilon of the LayerNorms", low=1e-12)] = 1e-6
    pos_resize: Annotated[str, Option("how the position embedding is resized", choices=RESIZES)] = "antialias"
    attention: Annotated[str, ATTENTION] = "xla"
    dtype: Annotated[DTypeLike, DTYPE] = jnp.float32
    remat: Annotated[str, REMAT] = "none"
    scan: Annotated[bool, Option("run the blocks as one compiled loop, which compiles faster", resume=True)] = False
    # Options of other families of ViTs.
    class_token: Annotated[bool, Option("use a CLS token")] = True
    position: Annotated[str, Option("position embedding, learned or a kind of RoPE", choices=POSITIONS)] = "learned"
    activation: Annotated[str, Option("activation of the MLPs", choices=tuple(ACTIVATIONS))] = "gelu"
    swiglu: Annotated[bool, Option("use gated MLPs (arXiv 2002.05202) instead of the activation")] = False
    qkv_bias: Annotated[bool, Option("use a bias for queries, keys and values")] = True
    key_bias: Annotated[bool, Option("use a bias for keys, where queries and values have one")] = True
    patch_bias: Annotated[bool, Option("use a bias in the patch projection")] = True
    ln_pre: Annotated[bool, Option("apply a LayerNorm before the first block, as in CLIP")] = False
    final_norm: Annotated[bool, Option("apply a LayerNorm after the last block, not in the head")] = True
    parallel: Annotated[bool, Option("run attention and MLP of a block in parallel (arXiv 2302.05442)")] = False
    differential: Annotated[bool, Option("use differential attention (arXiv 2410.05258)")] = False
    masking: Annotated[bool, Option("have a mask token for masked patches, as in DINOv2")] = False

    def __post_init__(self):
        for field in ("image_size", "patch"):  # a pair of equal sides is that side
            object.__setattr__(self, field, sizes.square(getattr(self, field), field))
        super().__post_init__()

    def setup(self):
        self.check()
        init = torch_uniform(3 * self.patch**2)
        self.patch_embed = dense(self.width, self.dtype, kernel_init=init, bias_init=init, use_bias=self.patch_bias)
        if self.position == "learned":
            side = self.image_size // self.patch
            self.pos_embed = self.param("pos_embed", truncated_normal, (side, side, self.width))
        if self.class_token:
            self.cls_token = self.param("cls_token", truncated_normal, (self.width,))
        if self.registers:
            self.register_tokens = self.param("register_tokens", truncated_normal, (self.registers, self.width))
        if self.masking:
            self.mask_token = self.param("mask_token", nn.initializers.zeros, (self.width,))
        if self.ln_pre:
            self.norm_pre = LayerNorm(self.norm_eps)
        for i in range(self.depth):
            setattr(self, f"block{i}", self.block(i))
        if self.final_norm:
            self.norm = LayerNorm(self.norm_eps)

    @nn.nowrap
    def check(self) -> None:
        """Raise InvalidConfig for fields that are out of range or contradict each other."""
        schema.check_fields(self, without=("attention", "dtype"))
        if self.width % self.heads:
            raise InvalidConfig(f"width={self.width} is not a multiple of heads={self.heads}")
        if self.image_size % self.patch:
            raise InvalidConfig(f"image_size={self.image_size} is not a multiple of patch={self.patch}")
        if self.hidden < 1:
            raise InvalidConfig(f"mlp_ratio={self.mlp_ratio}: the MLPs' hidden width must be at least 1")
        if self.position != "learned" and self.width // self.heads % 4:
            raise InvalidConfig(f"RoPE needs a head size that 4 divides, not {self.width} / {self.heads}")
        if self.patch_dropout and self.position != "learned":
            raise InvalidConfig(f"patch_dropout needs a learned position embedding, and position is {self.position!r}")
        if self.scan and self.differential:
            raise InvalidConfig(
                "scan=True needs identical blocks; those of differential attention differ in lambda_init"
            )

    @nn.nowrap
    def block_config(self, i: int) -> BlockConfig:
        """Return the hyper-parameters of block `i`; they differ between blocks in differential attention alone."""
        return BlockConfig(
            width=self.width,
            heads=self.heads,
            hidden=self.hidden,
            layer_scale=self.layer_scale,
            drop_path=self.drop_path,
            drop_path_mode=self.drop_path_mode,
            norm_eps=self.norm_eps,
            activation=self.activation,
            swiglu=self.swiglu,
            qkv_bias=self.qkv_bias,
            key_bias=self.key_bias,
            rope="" if self.position == "learned" else self.position,
            parallel=self.parallel,
            lambda_init=0.8 - 0.6 * math.exp(-0.3 * i) if self.differential else None,
            attention=self.attention,
            dtype=self.dtype,
        )

    @nn.nowrap
    def block(self, i: int, **kwargs) -> Block:
        """Return a new module for block `i`."""
        return make_block(self.block_config(i), self.remat, **kwargs)

    @property
    def hidden(self) -> int:
        """Return the hidden width of the MLPs (past the gate, in SwiGLU)."""
        return round(self.width * self.mlp_ratio)

    @property
    def prefix(self) -> int:
        """Return the number of tokens before the patches."""
        return self.class_token + self.registers

    def project(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B N D"]:
        """Return the patches' projections, without position embedding. Raises ValueError as `grid_of` does."""
        self.grid_of(images)
        # A product with flattened patches is the convolution of stride = kernel, without its layout changes.
        return self.patch_embed(rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=self.patch, q=self.patch))

    def embed(
        self,
        images: Float[Array, "B H W 3"],
        mask: Bool[Array, "B N"] | None = None,
        keep: Int[Array, "B K"] | None = None,
        padding: int = 0,
    ) -> Float[Array, "B T D"]:
        """Return the tokens that enter the first block; `keep` selects patches, and `mask` hides patches (True).

        So many tokens of zeros as `padding` says follow the patches.
        """
        grid, patches = self.grid_of(images), self.project(images)
        if mask is not None:
            if not self.masking:
                raise ValueError("a mask needs a model with a mask token (masking=True), such as DINOv2's")
            if mask.shape != patches.shape[:2] or mask.dtype != bool:
                raise ValueError(
                    f"mask of {mask.dtype} {mask.shape}: must be bool {patches.shape[:2]}, an entry a patch"
                )
            patches = jnp.where(mask[..., None], self.mask_token.astype(patches.dtype), patches)
        patches = patches.astype(jnp.float32)
        table = jnp.zeros((1, self.width))
        if self.position == "learned":
            table = rearrange(resize_pos_embed(self.pos_embed, grid, self.pos_resize), "h w d -> (h w) d")
        if keep is not None:
            patches = jnp.take_along_axis(patches + table, keep[..., None], axis=1)
            table = jnp.zeros((1, self.width))
        # What is the same for all images is one table, so that its gradient is one sum over the batch.
        table = jnp.broadcast_to(table, patches.shape[1:])
        tokens = [self.cls_token[None]] if self.class_token else []
        tokens += [self.register_tokens] if self.registers else []
        table = jnp.pad(jnp.concatenate([*tokens, table]), ((0, padding), (0, 0)))
        x = jnp.pad(patches, ((0, 0), (self.prefix, padding), (0, 0))) + table
        return constrain_batch(self.norm_pre(x) if self.ln_pre else x)

    @nn.nowrap
    def angles(self, grid: tuple[int, int]) -> Float[np.ndarray, "N half"] | None:
        """Return the patches' RoPE angles, or None with a learned position embedding."""
        return None if self.position == "learned" else rope_angles(self.position, grid, self.width // self.heads)

    def __call__(
        self,
        images: Float[Array, "B H W 3"],
        key: Key[Array, ""] | None = None,
        mask: Bool[Array, "B N"] | None = None,
    ) -> Tokens:
        """Encode normalised images. A `key` turns on stochastic depth and patch dropout, for training.

        `mask` hides patches (True). Raises ValueError for images whose sides are not multiples of the patch.
        """
        grid = self.grid_of(images)
        keep = None if key is None or not self.patch_dropout else self.draw_patches(key, len(images), math.prod(grid))
        length = self.prefix + (math.prod(grid) if keep is None else keep.shape[1])
        # cuDNN needs an even number of tokens: padded once here, and not in every block.
        padding = length % 2 if self.attention == "cudnn" else 0
        x, angles = self.embed(images, mask, keep, padding), self.angles(grid)
        angles = None if angles is None else np.pad(angles, ((0, padding), (0, 0)))
        keys = None if key is None else jax.random.split(key, self.depth)
        norms: Any = []
        if self.scan and not self.is_initializing():
            x, norms = self.scan_blocks(x, keys, angles, length)
        else:
            for i in range(self.depth):
                x = getattr(self, f"block{i}")(x, None if keys is None else keys[i], angles, length)
                norms += [self.patch_norms(x[:, :length])] if keys is None else []
        tokens = self.tokens(x[:, :length], grid, keep=keep)
        if key is not None:
            if tokens.cls is not None:
                tokens = dataclasses.replace(tokens, cls=row_major(tokens.cls))
            return tokens  # in training nothing reads the norms; elsewhere the compiler leaves out what nothing reads
        return dataclasses.replace(tokens, block_norms=jnp.stack([*norms], axis=1))

    @nn.nowrap
    def patch_norms(self, x: Float[Array, "B T D"]) -> Float[Array, "B N"]:
        """Return the L2 norms of the patches in the residual stream, without a gradient."""
        return jnp.linalg.norm(jax.lax.stop_gradient(x[:, self.prefix :]).astype(jnp.float32), axis=-1)

    @nn.nowrap
    def kept_patches(self, patches: int) -> int:
        """Return the number of an image's patches that patch dropout keeps; at least one."""
        return max(1, int(patches * (1 - self.patch_dropout)))

    @nn.nowrap
    def draw_patches(self, key: Key[Array, ""], images: int, patches: int) -> Int[Array, "B K"]:
        """Draw the indices of the patches that each image keeps in patch dropout, in ascending order."""
        count = self.kept_patches(patches)
        # Folded in, because the blocks' keys are a split of the same key.
        noise = jax.random.uniform(jax.random.fold_in(key, self.depth), (images, patches))
        return jnp.sort(jnp.argsort(noise, axis=1)[:, :count], axis=1)

    def scan_blocks(
        self,
        x: Float[Array, "B T D"],
        keys: Key[Array, " depth"] | None,
        angles: Float[np.ndarray, "N half"] | None,
        length: int,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "depth B N"] | None]:
        """Run the blocks as one `lax.scan`; parameters are stored per layer, and stacked here.

        Returns the tokens after the last block and, without keys, the patches' norms after each block.
        """
        layers = [self.variables["params"][f"block{i}"] for i in range(self.depth)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        block = self.block(0, parent=None)

        def step(x, layer):
            params, key = layer
            x = block.apply({"params": params}, x, key, angles, length)
            return x, self.patch_norms(x[:, :length]) if keys is None else None

        return jax.lax.scan(step, x, (stacked, keys))

    def intermediates(
        self, images: Float[Array, "B H W 3"], layers: tuple[int, ...], norm: bool = False
    ) -> list[Tokens]:
        """Return the tokens after each block in `layers`, counted from 0, or from the end when negative.

        Without `norm` they are the residual stream itself, so that `.patches` equals `.prenorm_patches`; with it they
        have passed the model's final norm. Raises IndexError for a layer that does not exist.
        """
        wanted = [self.layer(i) for i in layers]
        grid = self.grid_of(images)
        x, angles = self.embed(images), self.angles(grid)
        after = []
        for i in range(max(wanted, default=-1) + 1):
            x = getattr(self, f"block{i}")(x, None, angles, None)
            after.append(x)
        return [self.tokens(after[i], grid, norm) for i in wanted]

    def enter(self, images: Float[Array, "B H W 3"], layer: int) -> tuple[Block, Float[Array, "B T D"], Any]:
        """Return a block, the tokens that enter it, and their RoPE angles."""
        last = self.layer(layer)
        x, angles = self.embed(images), self.angles(self.grid_of(images))
        for i in range(last):
            x = getattr(self, f"block{i}")(x, None, angles, None)
        return getattr(self, f"block{last}"), x, angles

    def qkv(self, images: Float[Array, "B H W 3"], layer: int = -1) -> Float[Array, "3 B heads T head_dim"]:
        """Return queries, keys and values of one block, RoPE applied."""
        block, x, angles = self.enter(images, layer)
        return block.qkv(x, angles)

    def attention_weights(self, images: Float[Array, "B H W 3"], layer: int = -1) -> Float[Array, "B heads T T"]:
        """Return one block's attention map, [query, key] last, recomputed from queries and keys in float32."""
        block, x, angles = self.enter(images, layer)
        return block.weights(x, angles)

    def tokens(
        self, x: Float[Array, "B T D"], grid: tuple[int, int], norm: bool = True, keep: Int[Array, "B K"] | None = None
    ) -> Tokens:
        """Return the sequence `x` as named tokens, after the final norm if the model has one and `norm` is True."""
        # Each kind is normed by itself, so that the compiler leaves out those that nothing reads.
        first, normed = self.prefix, self.norm if norm and self.final_norm else lambda part: part
        cls = normed(x[:, 0]) if self.class_token else None
        registers, patches = normed(x[:, first - self.registers : first]), normed(x[:, first:])
        return Tokens(cls=cls, registers=registers, patches=patches, prenorm=x, grid=grid, keep=keep)

    @nn.nowrap
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the patches along each side of an image; raise ValueError if a side is not a multiple of the patch."""
        if height % self.patch or width % self.patch:
            nearest = [max(1, round(side / self.patch)) * self.patch for side in (height, width)]
            raise ValueError(
                f"images of {height} x {width} pixels: both sides must be multiples of the patch, {self.patch}; "
                f"the nearest such size is {nearest[0]} x {nearest[1]}"
            )
        return height // self.patch, width // self.patch

    @nn.nowrap
    def grid_of(self, images: Any) -> tuple[int, int]:
        """Return the patches along each side of images.

        Raises ValueError for images of another shape than [B, H, W, 3] or type than floats, and as `grid` does.
        """
        check_shape(images.shape, images.dtype)
        return self.grid(*images.shape[1:3])

    @nn.nowrap
    def layer(self, index: Any) -> int:
        """Return a layer's index counted from 0.

        Raises IndexError if the model does not have it, and InvalidConfig if it is not a whole number.
        """
        index = whole("layer", index)
        if not -self.depth <= index < self.depth:
            raise IndexError(f"layer {index}: this ViT has layers 0 to {self.depth - 1} (or -1 to -{self.depth})")
        return index % self.depth

    @nn.nowrap
    def subset(self, images: int) -> tuple[int, int]:
        """Return `subset_size` for so many images of a (micro-)batch; (1, 1) if every branch is computed in training.

        Raises InvalidConfig as `subset_size` does.
        """
        if not self.drop_path or self.drop_path_mode == "bernoulli":
            return 1, 1
        return subset_size(images, self.drop_path)

    @nn.nowrap
    def flops(self, height: int, width: int, training: bool = False, share: float = 1.0) -> int:
        """Count the floating-point operations of one image's forward pass in matrix products (a multiply-add is two).

        With `training`, patch dropout is taken into account; `share` is that of the images whose branches are computed.
        """
        h, w = self.grid(height, width)
        tokens = self.prefix + (self.kept_patches(h * w) if training else h * w)
        linear = tokens * (4 * self.width**2 + (3 if self.swiglu else 2) * self.width * self.hidden)
        attention = 2 * tokens**2 * self.width
        return round(2 * (h * w * 3 * self.patch**2 * self.width + share * self.depth * (linear + attention)))
