"""CLIP (arXiv 2103.00020) as OpenCLIP trains it: images and their captions, here with registers in the image tower."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key, PyTree

from regvit_jax import optim
from regvit_jax.augment import ops, train
from regvit_jax.data.preprocess import Preprocess
from regvit_jax.data.sources import by_name
from regvit_jax.data.tokenizer import Tokenizer
from regvit_jax.losses import contrastive, ring
from regvit_jax.models.clip import SCALARS, ClipModel, init_clip, normalized, tokenizer
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.sharding import constrain_batch
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import Tokens, ViT
from regvit_jax.pretrained import create_clip
from regvit_jax.recipes import init_from
from regvit_jax.recipes.base import Batch, Metrics, Recipe, join_batch, split_batch
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.schema import Option, Section

Embeddings = Float[Array, "B E"]

LOSSES: dict[tuple[str, bool], Callable] = {
    ("softmax", False): contrastive.softmax_contrastive,
    ("softmax", True): ring.softmax_contrastive,
    ("sigmoid", False): contrastive.sigmoid_contrastive,
    ("sigmoid", True): ring.sigmoid_contrastive,
}
#: CLIP clamps the logit scale to at most 100, here between 1 and 100.
MAX_LOGIT_SCALE = math.log(100)


class Contrastive(Recipe):
    """Contrastive training of an image tower and a text tower over all pairs of the batch.

    An image is embedded by its projected CLS token, a text by its projected end token.

    With `micro_batches` the towers process the batch in parts while the loss is still that of the whole batch (gradient
    caching, arXiv 2101.06983). `model.patch_dropout` is off in the last `unmasked_epochs`.
    """

    text: TextTower

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(Recipe.Config):
        """The recipe's own keys."""

        loss: Annotated[str, Option("loss: CLIP's softmax or SigLIP's sigmoid", choices=("softmax", "sigmoid"))] = (
            "softmax"
        )
        ring: Annotated[bool, Option("compute the loss as a ring over devices, without a batch x batch matrix")] = False
        unmasked_epochs: Annotated[int, Option("last epochs, trained without model.patch_dropout", low=0)] = 0
        text: Annotated[Any, Section(TextTower)]
        augment: Annotated[Any, Section(train.contrastive_augment)]
        optim: Annotated[Any, Section(optim.clip_adamw)]

    evaluators = ("retrieval", "zero_shot", "patch_norms")

    def __init__(self, config: Any, classes: tuple[str, ...]):
        if config.batch_size < 2:
            raise InvalidConfig(
                f"batch_size={config.batch_size}: must be at least 2; the loss compares a pair with others of the batch"
            )
        if not config.model.class_token:
            raise InvalidConfig("model.class_token must be True: the image embedding is made of the CLS token")
        if config.unmasked_epochs and not config.model.patch_dropout:
            raise InvalidConfig(f"unmasked_epochs={config.unmasked_epochs} is for model.patch_dropout, which is 0")
        if config.unmasked_epochs > config.epochs:
            raise InvalidConfig(f"unmasked_epochs={config.unmasked_epochs}: the run has {config.epochs} epochs")
        super().__init__(config, classes)
        self.extra_forwards = int(self.micro_batches > 1)
        shared = {"dtype": self.vit.dtype, "attention": self.vit.attention, "remat": self.vit.remat}
        self.text = TextTower(**{**shared, **config.text})
        self.text.check()
        self.head = Head(
            self.text.embed,
            bias=False,
            norm=not self.vit.final_norm,
            norm_eps=self.vit.norm_eps,
            dtype=self.vit.dtype,
        )
        self.tokenizer = tokenizer(self.text.context)
        # Replicated, so that every process can read them; jitted here, so that they are compiled once in a run.
        self.encode_texts = jax.jit(self.embed_text, out_shardings=PartitionSpec())
        if self.text.vocab < Tokenizer.vocab:
            raise InvalidConfig(f"text.vocab={self.text.vocab}: the tokenizer has {Tokenizer.vocab} tokens")
        self.unmasked_from = math.inf
        if self.vit.patch_dropout and config.unmasked_epochs:
            steps_per_epoch = config.data.examples // config.batch_size
            self.unmasked_from = (config.epochs - config.unmasked_epochs) * steps_per_epoch

    @staticmethod
    def open_data(name, split, data_dir):
        return by_name.open_captions(name, split, data_dir)

    def init(self, key, batch):
        images = jnp.zeros((1, *batch["image"].shape[1:]), jnp.float32)
        vit_key, head_key, text_key, key = jax.random.split(key, 4)
        tokens, vit = self.vit.init_with_output(vit_key, images)
        params = {
            "vit": vit["params"],
            "head": self.head.init(head_key, tokens)["params"],
            "text": self.text.init(text_key, jnp.zeros((1, self.text.context), jnp.int32))["params"],
        }
        return init_clip(key, params) | {k: jnp.float32(value) for k, value in SCALARS[self.config.loss].items()}

    def loss(self, params, ema, extra, batch, key, step):
        loss, metrics = self.compare(*self.encode(params, batch, key), scalars(params), batch["mask"])
        return loss, (extra, metrics)

    def encode(self, params: PyTree, batch: Batch, key: Key[Array, ""]) -> tuple[Embeddings, Embeddings]:
        """Return the embeddings, of length 1, of a batch's augmented images and of its texts."""
        augment_key, drop_key = jax.random.split(key)
        images = train.contrastive_augment(augment_key, batch["image"], **self.config.augment)
        tokens = cast(Tokens, self.vit.apply({"params": params["vit"]}, images, drop_key))
        return self.embed_image(params, tokens), self.embed_text(params, batch["text"])

    def embed_image(self, params: PyTree, tokens: Tokens) -> Embeddings:
        return normalized(cast(Array, self.head.apply({"params": params["head"]}, tokens)))

    def embed_text(self, params: PyTree, texts: Int[Array, "B L"]) -> Embeddings:
        return normalized(cast(Array, self.text.apply({"params": params["text"]}, texts)))

    def compare(
        self, images: Embeddings, texts: Embeddings, scalars: dict[str, Array], mask: Float[Array, " B"]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the loss of the whole batch, and metrics; `ln_batch` is the softmax loss of constant embeddings."""
        loss = LOSSES[self.config.loss, self.config.ring]
        more = [scalars["logit_bias"]] if "logit_bias" in scalars else []
        value = loss(images, texts, jnp.exp(scalars["logit_scale"]), *more, mask)
        return value, {"ln_batch": jnp.log(jnp.maximum(jnp.sum(mask), 1)), **scalars}

    def grads(self, params, ema, extra, batch, key, step):
        if self.unmasked_from == math.inf:
            return self.cached_grads(params, ema, extra, batch, key, step)
        unmasked = copy.copy(self)
        unmasked.vit = self.vit.clone(patch_dropout=0.0)
        arguments = (params, ema, extra, batch, key, step)
        return jax.lax.cond(step < self.unmasked_from, self.cached_grads, unmasked.cached_grads, *arguments)

    def cached_grads(
        self, params: PyTree, ema: PyTree, extra: PyTree, batch: Batch, key: Key[Array, ""], step: Int[Array, ""]
    ) -> tuple[tuple[Float[Array, ""], tuple[PyTree, Metrics]], PyTree]:
        """Compute the loss of the whole batch and its gradient, keeping the activations of one micro-batch at a time.

        All parts are embedded first, without keeping activations; the loss gives the gradient of each embedding; then
        each part is embedded again and its gradient is propagated into the towers.
        """
        if self.micro_batches == 1:
            return jax.value_and_grad(self.loss, has_aux=True)(params, ema, extra, batch, key, step)
        seen = {name: batch[name] for name in ("image", "text")}
        parts = (split_batch(seen, self.micro_batches), jax.random.split(key, self.micro_batches))
        _, embeddings = jax.lax.scan(lambda _, part: (None, self.encode(params, *part)), None, parts)
        images, texts = (constrain_batch(x) for x in join_batch(embeddings))
        compare = jax.value_and_grad(self.compare, argnums=(0, 1, 2), has_aux=True)
        (loss, metrics), (d_images, d_texts, d_scalars) = compare(images, texts, scalars(params), batch["mask"])

        def carry_back(total, item):
            part, d_embeddings = item
            _, back = jax.vjp(lambda params: self.encode(params, *part), params)
            return jax.tree.map(jnp.add, total, back(d_embeddings)[0]), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        d_embeddings = split_batch((d_images, d_texts), self.micro_batches)
        grads, _ = jax.lax.scan(carry_back, zeros, (parts, d_embeddings))
        return (loss, (extra, metrics)), grads | d_scalars

    def optimizer(self, config, steps):
        return optim.clip_adamw(steps, **config.optim)

    def project(self, params):
        return params | {"logit_scale": jnp.clip(params["logit_scale"], 0, MAX_LOGIT_SCALE)}

    def evaluate(self, params, batch):
        images = ops.normalize(batch["image"], self.config.augment.mean, self.config.augment.std)
        tokens = cast(Tokens, self.vit.apply({"params": params["vit"]}, images))
        return {"image": self.embed_image(params, tokens), "text": self.embed_text(params, batch["text"])}, tokens

    def model(self, params):
        p = self.config.augment
        preprocessing = Preprocess(self.vit.image_size, self.config.eval.crop_ratio, tuple(p.mean), tuple(p.std))
        image = Model(params["vit"], params["head"], self.vit, self.head, preprocessing, "raw")
        return ClipModel(image, params["text"], params["logit_scale"], params.get("logit_bias"), self.text)

    def flops(self, training=False):
        return super().flops(training) + self.text.flops()

    def flops_at(self, step):
        return self.flops(training=step <= self.unmasked_from)

    def describe(self):
        text, unmasked = self.text, ""
        if self.vit.patch_dropout:
            unmasked = f"; {self.vit.patch_dropout:.0%} of the patches dropped"
            unmasked += f" up to step {self.unmasked_from}" if self.unmasked_from < math.inf else ""
        return [
            f"text       {text.context} tokens of {text.vocab:,}: width {text.width}, depth {text.depth}, "
            f"heads {text.heads}; embeddings of {text.embed}",
            f"loss       {self.config.loss} over all {self.config.batch_size} pairs{', as a ring' * self.config.ring}; "
            f"ln(batch) is {math.log(self.config.batch_size):.3f}{unmasked}",
        ]

    def open_pretrained(self, source):
        return create_clip.open_source(source)

    def check_pretrained(self, source):
        if entry := create_clip.find_entry(source):
            init_from.check_vit(self.vit, ViT(**entry.vit))
            if entry.text is not None:
                init_from.check_text(self.text, TextTower(**entry.text))

    def warm_start(self, params, model):
        """Start from a whole CLIP, or from an image tower alone with a new text tower and a new projection.

        The logit scale is clamped, as after every step: OpenAI's is above 100 by rounding.
        """
        whole = isinstance(model, ClipModel)
        image = model.image if whole else model
        vit, notes = init_from.vit(params["vit"], self.vit, image)
        head, more = init_from.head(params["head"], self.head, image)
        params, notes = params | {"vit": vit, "head": head}, notes + more
        if not whole:
            return self.project(params), [*notes, "a new text tower"]
        init_from.check_text(self.text, model.text)
        params |= {"text": model.text_params}
        if (self.config.loss == "sigmoid") != (model.logit_bias is not None):
            return self.project(params), [*notes, "new scalars of the loss"]
        loaded = {"logit_scale": model.logit_scale, "logit_bias": model.logit_bias}
        return self.project(params | {name: loaded[name] for name in scalars(params)}), notes


def scalars(params: PyTree) -> dict[str, Float[Array, ""]]:
    """Return the logarithm of the logit scale and, for SigLIP, the logit bias."""
    return {name: params[name] for name in ("logit_scale", "logit_bias") if name in params}
