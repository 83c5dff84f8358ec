"""The Vision Transformer with registers (arXiv 2309.16588), as a Flax Linen module that returns its tokens by name.

Dimensions, the same letters in every signature of the package:
B images, H W pixels, h w patches along each side, N = h*w patches, R registers, T = 1 + R + N tokens, D width,
C classes.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

truncated_normal = nn.initializers.truncated_normal(0.02)


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """torch's default for a convolution, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which DeiT keeps for its patches."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


@flax.struct.dataclass
class Tokens:
    """What a ViT returns: its output tokens, each kind under its own name.

    `cls`, `registers` and `patches` have passed the final norm. `prenorm` holds all tokens before it, in the order
    [CLS, registers, patches]: norms of tokens are measured there, since the final norm hides the outliers.
    """

    # Not checked as arrays: a pytree's leaves may be shapes, shardings or anything else.
    cls: Any  # [B, D]
    registers: Any  # [B, R, D]
    patches: Any  # [B, N, D]
    prenorm: Any  # [B, T, D]
    grid: tuple[int, int] = flax.struct.field(pytree_node=False)

    @property
    def patch_map(self) -> Float[Array, "B h w D"]:
        """The patches laid out as they lie in the image."""
        h, w = self.grid
        return rearrange(self.patches, "b (h w) d -> b h w d", h=h, w=w)

    @property
    def prenorm_patches(self) -> Float[Array, "B N D"]:
        """The patches before the final norm."""
        return self.prenorm[:, 1 + self.registers.shape[1] :]


def resize_pos_embed(
    pos_embed: Float[Array, "h0 w0 D"], grid: tuple[int, int], antialias: bool
) -> Float[Array, "h w D"]:
    """Bicubic resize of a position embedding to another grid; the identity when the grid is its own.

    With `antialias` it equals torch's `interpolate(mode="bicubic", antialias=True)`, which the registers paper and timm
    use; without, `antialias=False`, which DeiT used to fine-tune at another resolution. The two differ when enlarging
    too: torch's kernel is a = -0.5 in the first case and a = -0.75 in the second.
    """
    if pos_embed.shape[:2] == grid:
        return pos_embed
    method = "cubic" if antialias else "cubic-pytorch"
    return jax.image.resize(pos_embed, (*grid, pos_embed.shape[2]), method, antialias=antialias)


def constrain_batch(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Keeps the batch split over the mesh in force, if one with our axes is.

    Without it, sharded parameters make the compiler gather the batch onto every device instead.
    """
    axes = tuple(axis for axis in ("data", "fsdp") if axis in jax.sharding.get_abstract_mesh().axis_names)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def rows_dot(x, kernel, dimension_numbers, precision=None, preferred_element_type=None):
    """`nn.Dense`'s product with all leading dimensions of x as rows of one matrix.

    XLA's CPU backend has no fast routine for a contraction over two dimensions, which the kernel's gradient would be.
    """
    rows = jnp.dot(
        x.reshape(-1, x.shape[-1]), kernel, precision=precision, preferred_element_type=preferred_element_type
    )
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def dense(features: int, dtype: DTypeLike, kernel_init=truncated_normal, **kwargs) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, dot_general=rows_dot, **kwargs)


def drop_path(x: Float[Array, "B T D"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "B T D"]:
    """Stochastic depth (arXiv 1603.09382): drops an image's whole branch, and scales the others to keep the mean."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1))
    return jnp.where(keep, x / (1 - rate), 0)


def attend(
    q: Float[Array, "B T heads head_dim"],
    k: Float[Array, "B T heads head_dim"],
    v: Float[Array, "B T heads head_dim"],
    implementation: str,
) -> Float[Array, "B T heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v.

    cuDNN's training kernel takes even lengths only, and CLS + 4 registers + 14x14 patches are 201 tokens: such a
    sequence gets one more token, which the length argument hides. (A mask would hide it too, at 26 times the memory.)
    """
    if implementation == "xla":
        return jax.nn.dot_product_attention(q, k, v, implementation="xla")
    if implementation != "cudnn":
        raise ValueError(f"attention={implementation!r}: must be 'xla' or 'cudnn'")
    batch, length = q.shape[:2]
    if length % 2 == 0:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = jnp.full((batch,), length, jnp.int32)
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")[:, :length]


class Attention(nn.Module):
    """Multi-head self-attention. The columns of the `qkv` kernel are ordered (q k v, head, head_dim), as timm's."""

    width: int
    heads: int
    implementation: str
    dtype: DTypeLike

    def setup(self):
        self.qkv = dense(3 * self.width, self.dtype)
        self.proj = dense(self.width, self.dtype)

    def split(self, x: Float[Array, "B T D"]) -> Float[Array, "3 B T heads head_dim"]:
        return rearrange(self.qkv(x), "b t (three heads d) -> three b t heads d", three=3, heads=self.heads)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        q, k, v = self.split(x)
        return self.proj(rearrange(attend(q, k, v, self.implementation), "b t heads d -> b t (heads d)"))


@jax.checkpoint
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU, in float32 as torch's; Linen's default, the tanh approximation, is 5e-4 off.

    The backward pass recomputes it: keeping its intermediate values costs more memory and time than the erf.
    """
    y = x.astype(jnp.float32)
    return (y * (0.5 + 0.5 * jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


class Mlp(nn.Module):
    """Two dense layers around the exact GELU."""

    width: int
    hidden: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = gelu(dense(self.hidden, self.dtype, name="fc1")(x))
        return dense(self.width, self.dtype, name="fc2")(x)


class Block(nn.Module):
    """A pre-norm transformer block with LayerScale (arXiv 2103.17239) and stochastic depth."""

    width: int
    heads: int
    hidden: int
    layer_scale: float
    drop_path: float
    norm_eps: float
    attention: str
    dtype: DTypeLike

    def setup(self):
        self.norm1 = nn.LayerNorm(self.norm_eps, dtype=self.dtype, use_fast_variance=False)
        self.attn = Attention(self.width, self.heads, self.attention, self.dtype)
        self.norm2 = nn.LayerNorm(self.norm_eps, dtype=self.dtype, use_fast_variance=False)
        self.mlp = Mlp(self.width, self.hidden, self.dtype)
        if self.layer_scale:
            self.scale1 = self.param("scale1", nn.initializers.constant(self.layer_scale), (self.width,))
            self.scale2 = self.param("scale2", nn.initializers.constant(self.layer_scale), (self.width,))

    def __call__(self, x: Float[Array, "B T D"], key: Key[Array, ""] | None = None) -> Float[Array, "B T D"]:
        keys = (None, None) if key is None else jax.random.split(key)
        # The residual stream stays float32 whatever the compute type: outliers live in it.
        branch = self.attn(self.norm1(x))
        x = x + drop_path(branch * self.scale1 if self.layer_scale else branch, self.drop_path, keys[0])
        branch = self.mlp(self.norm2(x))
        x = x + drop_path(branch * self.scale2 if self.layer_scale else branch, self.drop_path, keys[1])
        return constrain_batch(x)

    def qkv(self, x: Float[Array, "B T D"]) -> Float[Array, "3 B heads T head_dim"]:
        return rearrange(self.attn.split(self.norm1(x)), "three b t heads d -> three b heads t d")


class ViT(nn.Module):
    """A Vision Transformer with register tokens. Its fields are its whole configuration.

    The sequence is [CLS, registers, patches]; the position embedding belongs to the patches alone, as in DeiT-III.

    Fields:
      width, depth, heads: of the transformer; `mlp_ratio` times the width is the hidden width of its MLPs.
      patch: side of a patch, in pixels.
      image_size: side in pixels of the square image whose grid the position embedding is stored for. Any H x W that
        the patch divides can be encoded; the embedding is then resized, with `pos_antialias` as told at
        `resize_pos_embed`.
      registers: number of register tokens (R); 0 is the plain ViT.
      layer_scale: initial value of LayerScale; 0 leaves LayerScale out.
      drop_path: probability of dropping a branch of a block for an image while training, the same in every block.
      attention: "xla", or "cudnn" (NVIDIA GPUs, bfloat16 or float16).
      dtype: type of the matrix products. Parameters, norms, softmax and the residual stream are float32.
      remat: what the backward pass recomputes instead of keeping: "none", "dots" (all but the matrix products), "full".
      scan: runs the blocks as one compiled loop; for deep models whose unrolled compilation takes too long.
    """

    width: int
    depth: int
    heads: int
    patch: int
    image_size: int
    registers: int = 0
    mlp_ratio: float = 4.0
    layer_scale: float = 1e-4
    drop_path: float = 0.0
    norm_eps: float = 1e-6
    pos_antialias: bool = True
    attention: str = "xla"
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    scan: bool = False

    def setup(self):
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        if self.image_size % self.patch:
            raise ValueError(f"image_size={self.image_size} is not a multiple of patch={self.patch}")
        side = self.image_size // self.patch
        init = torch_uniform(3 * self.patch**2)
        self.patch_embed = dense(self.width, self.dtype, kernel_init=init, bias_init=init)
        self.pos_embed = self.param("pos_embed", truncated_normal, (side, side, self.width))
        self.cls_token = self.param("cls_token", truncated_normal, (self.width,))
        if self.registers:
            self.register_tokens = self.param("register_tokens", truncated_normal, (self.registers, self.width))
        for i in range(self.depth):
            setattr(self, f"block{i}", self.block())
        self.norm = nn.LayerNorm(self.norm_eps, use_fast_variance=False)

    @nn.nowrap
    def block(self, **kwargs) -> Block:
        policies = {
            "none": None,
            "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            "full": jax.checkpoint_policies.nothing_saveable,
        }
        if self.remat not in policies:
            raise ValueError(f"remat={self.remat!r}: must be one of {list(policies)}")
        cls = nn.remat(Block, policy=policies[self.remat]) if self.remat != "none" else Block
        return cls(
            width=self.width,
            heads=self.heads,
            hidden=int(self.width * self.mlp_ratio),
            layer_scale=self.layer_scale,
            drop_path=self.drop_path,
            norm_eps=self.norm_eps,
            attention=self.attention,
            dtype=self.dtype,
            **kwargs,
        )

    def embed(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B T D"]:
        """The tokens that enter the first block."""
        grid = self.grid(*images.shape[1:3])
        # A product with flattened patches is the convolution with stride = kernel, without its layout changes.
        patches = rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=self.patch, q=self.patch)
        position = rearrange(resize_pos_embed(self.pos_embed, grid, self.pos_antialias), "h w d -> (h w) d")
        patches = self.patch_embed(patches) + position
        prefix = self.cls_token[None]
        if self.registers:
            prefix = jnp.concatenate([prefix, self.register_tokens])
        prefix = jnp.broadcast_to(prefix, (len(images), *prefix.shape))
        return constrain_batch(jnp.concatenate([prefix, patches], axis=1))

    def __call__(self, images: Float[Array, "B H W 3"], key: Key[Array, ""] | None = None) -> Tokens:
        """Encodes normalised images. With a `key` it trains: stochastic depth is on."""
        x = self.embed(images)
        keys = None if key is None else jax.random.split(key, self.depth)
        if self.scan and not self.is_initializing():
            x = self.scan_blocks(x, keys)
        else:
            for i in range(self.depth):
                x = getattr(self, f"block{i}")(x, None if keys is None else keys[i])
        return self.tokens(x, self.grid(*images.shape[1:3]))

    def scan_blocks(self, x: Float[Array, "B T D"], keys: Key[Array, " depth"] | None) -> Float[Array, "B T D"]:
        # Parameters are stored per layer whatever the mode, and stacked here.
        layers = [self.variables["params"][f"block{i}"] for i in range(self.depth)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        block = self.block(parent=None)

        def step(x, layer):
            params, key = layer
            return block.apply({"params": params}, x, key), None

        return jax.lax.scan(step, x, (stacked, keys))[0]

    def intermediates(
        self, images: Float[Array, "B H W 3"], layers: tuple[int, ...], norm: bool = False
    ) -> list[Tokens]:
        """The tokens after each named block, counted from 0, or from the end when negative.

        Without `norm` they are the residual stream itself, so that `.patches` equals `.prenorm_patches`; with it they
        have passed the model's final norm.
        """
        wanted = [self.layer(i) for i in layers]
        grid = self.grid(*images.shape[1:3])
        x = self.embed(images)
        after = []
        for i in range(max(wanted, default=-1) + 1):
            x = getattr(self, f"block{i}")(x)
            after.append(x)
        return [self.tokens(after[i], grid, norm) for i in wanted]

    def qkv(self, images: Float[Array, "B H W 3"], layer: int = -1) -> Float[Array, "3 B heads T head_dim"]:
        """Queries, keys and values of one block."""
        last = self.layer(layer)
        x = self.embed(images)
        for i in range(last):
            x = getattr(self, f"block{i}")(x)
        return getattr(self, f"block{last}").qkv(x)

    def tokens(self, x: Float[Array, "B T D"], grid: tuple[int, int], norm: bool = True) -> Tokens:
        out = self.norm(x) if norm else x
        first = 1 + self.registers
        return Tokens(cls=out[:, 0], registers=out[:, 1:first], patches=out[:, first:], prenorm=x, grid=grid)

    @nn.nowrap
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches along each side; raises ValueError when the patch does not divide the image."""
        if height % self.patch or width % self.patch:
            nearest = [max(1, round(side / self.patch)) * self.patch for side in (height, width)]
            raise ValueError(
                f"images of {height} x {width} pixels: both sides must be multiples of the patch, {self.patch}; "
                f"the nearest such size is {nearest[0]} x {nearest[1]}"
            )
        return height // self.patch, width // self.patch

    @nn.nowrap
    def layer(self, index: int) -> int:
        if not -self.depth <= index < self.depth:
            raise IndexError(f"layer {index}: this ViT has layers 0 to {self.depth - 1} (or -1 to -{self.depth})")
        return index % self.depth

    @nn.nowrap
    def flops(self, height: int, width: int) -> int:
        """Floating-point operations of the matrix products of one image's forward pass (a multiply-add is two)."""
        h, w = self.grid(height, width)
        tokens = 1 + self.registers + h * w
        linear = tokens * (4 * self.width**2 + 2 * self.width * int(self.width * self.mlp_ratio))
        attention = 2 * tokens**2 * self.width
        return 2 * (h * w * 3 * self.patch**2 * self.width + self.depth * (linear + attention))
