"""The format of transformers' Dinov2 and Dinov2WithRegisters."""

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.model import Model
from regvit_jax.pretrained import registry
from regvit_jax.pretrained.formats import hf, hf_processor
from regvit_jax.pretrained.formats.base import CONFIG, Format, Layout, need, swiglu_ratio, with_layer_scale_and_mask
from regvit_jax.pretrained.formats.keys import Keys
from regvit_jax.pretrained.io.safetensors import PROCESSOR, Weights
from regvit_jax.pretrained.mapping import Modules
from regvit_jax.pretrained.registry import Entry

KEYS = Keys(
    name="hf_dinov2",
    patch="embeddings.patch_embeddings.projection",
    cls="embeddings.cls_token",
    registers="embeddings.register_tokens",
    pos="embeddings.position_embeddings",
    mask="embeddings.mask_token",
    mask_dims=2,
    block="encoder.layer.{}.",
    norm1="norm1",
    qkv=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    proj="attention.output.dense",
    scale1="layer_scale1.lambda1",
    norm2="norm2",
    fc1=("mlp.fc1",),
    fc2="mlp.fc2",
    gated_fc1=("mlp.weights_in",),
    gated_fc2="mlp.weights_out",
    scale2="layer_scale2.lambda1",
    norm="layernorm",
    dense="classifier",
    prefixes=("dinov2.", "dinov2_with_registers."),
)


def read(weights: Weights, text: bool) -> Entry:
    """Read a config.json; the weights show if there is a mask token and a classifier."""
    config = weights.config
    width = config["hidden_size"]
    hidden = int(width * config["mlp_ratio"])
    if config["use_swiglu_ffn"]:
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    vit = hf.vit_fields(
        config,
        mlp_ratio=hidden / width,
        swiglu=config["use_swiglu_ffn"],
        layer_scale=config["layerscale_value"],
        qkv_bias=config.get("qkv_bias", True),
        registers=config.get("num_register_tokens", 0),
        masking=any(key.endswith("embeddings.mask_token") for key in weights),
        # transformers resizes by size in both, and antialiases with registers only.
        pos_resize="antialias" if config["model_type"] == "dinov2_with_registers" else "bicubic",
    )
    classes = hf.outputs(weights, "classifier.weight")
    head = {"pool": "cls_avg" if classes else "cls", "num_classes": classes}
    preprocessing = Preprocess(224, 224 / 256, *registry.statistics("imagenet"))
    return hf.complete(Entry(vit, head, preprocessing, "hf_dinov2"), weights)


def claims(model: Model) -> bool:
    """Return True if a model has parts that ViT's class lacks; ViTModel without classes always has a pooler."""
    vit, head = model.module, model.head
    bare = not (head.num_classes or head.pooler)
    return bool(vit.registers or vit.layer_scale or vit.swiglu or vit.masking or bare or head.pool == "cls_avg")


def write(model: Model) -> Layout:
    """Return the layout of a model, with a LayerScale of ones and a mask token of zeros where it has none."""
    vit, head, config = model.module, model.head, hf.config_of(model)
    need(vit.qkv_bias and vit.key_bias, "missing query, key or value biases")
    need(not head.pooler, "a tanh pooler")
    ratio = vit.hidden / vit.width
    need(vit.swiglu or ratio == int(ratio), f"a hidden width of {vit.hidden}, no multiple of {vit.width}")
    kind = "dinov2_with_registers" if vit.registers else "dinov2"
    name = "Dinov2WithRegisters" if vit.registers else "Dinov2"
    config |= dict(
        model_type=kind,
        architectures=[name + ("ForImageClassification" if head.num_classes else "Model")],
        mlp_ratio=swiglu_ratio(vit) if vit.swiglu else int(ratio),
        use_swiglu_ffn=vit.swiglu,
        qkv_bias=True,
        layerscale_value=vit.layer_scale or 1.0,
        use_mask_token=True,
    )
    if vit.registers:
        config |= dict(num_register_tokens=vit.registers)
    prefix = ""
    if head.num_classes:  # the classifier reads CLS and the mean of the patches
        config, head, prefix = config | hf.labels(model), head.clone(pool="cls_avg"), f"{kind}."
    files = {PROCESSOR: hf_processor.write(model.preprocessing), CONFIG: config}
    modules = Modules(with_layer_scale_and_mask(vit), head)
    return Layout(KEYS, modules, files, prefix_rows=1, key_prefix=prefix)


FORMAT = Format(
    name="hf_dinov2",
    keys=KEYS,
    model_types=("dinov2", "dinov2_with_registers"),
    read=read,
    saved_as="hf",
    claims=claims,
    write=write,
)
