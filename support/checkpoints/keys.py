"""Weight names as data: those of the files on the Hub <-> ours, a table for each architecture.

Loading and saving go by the same table; the tables are looked up by the name of the model class, so
the classes themselves know nothing of files. A model of your own needs a table here.

    TABLES["T5"].to_ours("encoder.block.0.layer.0.SelfAttention.q.weight")
    # "encoder.block.0.self_attn.q_proj.weight"
"""

import itertools
import re

NameRows = dict[str, str | None]


class KeyTable:
    """Names in a weight file <-> names in our module; works in both directions.

    `rows` maps a pattern of file names to ours. `{}` stands for a layer index, `<a|b>` for each of
    a and b in turn (on both sides), "=" for the same name, None for a tensor that is known and
    skipped. `spellings` are (regex, replacement) pairs that bring the names other library versions
    write to the ones in `rows`.
    """

    IGNORED = re.compile(r"(num_batches_tracked|position_ids|rotary_emb\.inv_freq)$")

    def __init__(self, rows: NameRows, spellings: tuple[tuple[str, str], ...] = ()) -> None:
        self.spellings = spellings
        self.rows = {}
        for theirs, ours in rows.items():
            names = self.expand(theirs)
            same = theirs if ours == "=" else ours
            our_names = self.expand(same) if same else [None] * len(names)
            self.rows.update(zip(names, our_names, strict=True))
        self.by_file_name = self.by_outline(self.rows)
        self.by_our_name = self.by_outline({o: theirs for theirs, o in self.rows.items() if o})

    @staticmethod
    def expand(pattern: str) -> list[str]:
        """["q.weight", "k.weight"] for "<q|k>.weight"."""
        parts = re.split(r"<(.*?)>", pattern)
        choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
        return ["".join(chosen) for chosen in itertools.product(*choices)]

    @staticmethod
    def outline(name: str) -> str:
        """A name or pattern with "#" for each number: the key that finds its rows quickly."""
        return re.sub(r"\{\}|\d+", "#", name)

    def by_outline(self, rows: NameRows) -> dict[str, list[tuple[str, str | None]]]:
        """The rows, as (regex, target), by their pattern's outline."""
        grouped = {}
        for pattern, target in rows.items():
            regex = re.escape(pattern).replace(r"\{\}", r"(\d+)")
            grouped.setdefault(self.outline(pattern), []).append((regex, target))
        return grouped

    def translate(self, name: str, grouped: dict[str, list]) -> str | None:
        """The target of the row that fits, None if it is skipped, "?name" if no row fits."""
        for regex, target in grouped.get(self.outline(name), ()):
            if match := re.fullmatch(regex, name):
                return target and target.format(*match.groups())
        return f"?{name}"

    def to_ours(self, name: str) -> str | None:
        """Our name for a file's tensor, None if it is to be skipped, "?name" if no row knows it."""
        if self.IGNORED.search(name):
            return None
        for pattern, replacement in self.spellings:
            name = re.sub(pattern, replacement, name)
        return self.translate(name, self.by_file_name)

    def to_file(self, name: str) -> str:
        """The file's name (Hub layout) for one of our tensors, "?name" if no row knows it."""
        return self.translate(name, self.by_our_name)


# ---- The tables ----------------------------------------------------------------------------------

BLOCK = "<encoder|decoder>.block.{}"
FFN = "<encoder.block.{}.layer.1|decoder.block.{}.layer.2>"
T5_KEYS = KeyTable(
    {
        "shared.weight": "=",
        "lm_head.weight": "=",  # v1.1 only
        "<encoder|decoder>.embed_tokens.weight": None,  # copies of `shared`
        "<encoder|decoder>.final_layer_norm.weight": "=",
        "<encoder|decoder>.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
            "<encoder|decoder>.relative_attention_bias.weight"
        ),
        f"{BLOCK}.layer.0.SelfAttention.<q|k|v|o>.weight": (
            f"{BLOCK}.self_attn.<q|k|v|o>_proj.weight"
        ),
        f"{BLOCK}.layer.0.layer_norm.weight": f"{BLOCK}.self_attn_norm.weight",
        "decoder.block.{}.layer.1.EncDecAttention.<q|k|v|o>.weight": (
            "decoder.block.{}.cross_attn.<q|k|v|o>_proj.weight"
        ),
        "decoder.block.{}.layer.1.layer_norm.weight": "decoder.block.{}.cross_attn_norm.weight",
        # In some old files; cross-attention has no position bias and this must not be used.
        "decoder.block.{}.layer.1.EncDecAttention.relative_attention_bias.weight": None,
        f"{FFN}.DenseReluDense.<wi|wi_0|wi_1|wo>.weight": f"{BLOCK}.ffn.<wi|wi_0|wi_1|wo>.weight",
        f"{FFN}.layer_norm.weight": f"{BLOCK}.ffn_norm.weight",
    }
)


def moved(theirs: str, ours: str, names: tuple[str, ...]) -> NameRows:
    """Rows of names that differ in what stands before them."""
    return {theirs + name: ours + name for name in names}


NORM = "<weight|bias|running_mean|running_var>"
LAYER = "<encoder|decoder>.layers.{}"
RESNET_NAMES = (
    "conv1.weight",
    f"bn1.{NORM}",
    "layer{}.{}.<conv1|conv2|conv3|downsample.0>.weight",
    f"layer{{}}.{{}}.<bn1|bn2|bn3|downsample.1>.{NORM}",
)
DETR_NAMES = (
    "<input_projection|decoder.layernorm>.<weight|bias>",
    "query_position_embeddings.weight",
    f"{LAYER}.<self_attn_layer_norm|final_layer_norm|fc1|fc2>.<weight|bias>",
    "decoder.layers.{}.encoder_attn_layer_norm.<weight|bias>",
)
ATTENTION = "<encoder.layers.{}.self|decoder.layers.{}.self|decoder.layers.{}.encoder>_attn"
DETR_KEYS = KeyTable(
    moved("model.backbone.conv_encoder.model.", "backbone.", RESNET_NAMES)
    | moved("model.", "", DETR_NAMES)
    | {
        f"model.{ATTENTION}.<q|k|v|out>_proj.<weight|bias>": (
            f"{ATTENTION}.<q|k|v|o>_proj.<weight|bias>"
        ),
        "<class_labels_classifier|bbox_predictor.layers.{}>.<weight|bias>": "=",
    },
    spellings=(  # transformers 5's in-memory names
        (r"^model\.backbone\.model\.", "model.backbone.conv_encoder.model."),
        (r"attn\.o_proj\.", "attn.out_proj."),
        (r"\.mlp\.(fc[12])\.", r".\1."),
    ),
)

VIT_KEYS = KeyTable(  # timm's names
    {
        "<cls_token|pos_embed|norm.weight|norm.bias>": "=",
        "patch_embed.proj.<weight|bias>": "patch_embedding.<weight|bias>",
        "blocks.{}.<norm1|norm2|attn.qkv|attn.proj|mlp.fc1|mlp.fc2>.<weight|bias>": (
            "layers.{}.<layer_norm1|layer_norm2|self_attn.qkv|self_attn.proj|mlp.fc1|mlp.fc2>"
            ".<weight|bias>"
        ),
        "head.<weight|bias>": None,  # ImageNet's classes
    }
)

VISION_NAMES = (
    "embeddings.patch_embedding.<weight|bias>",
    "embeddings.position_embedding.weight",
    "encoder.layers.{}.<layer_norm1|layer_norm2|mlp.fc1|mlp.fc2>.<weight|bias>",
    "encoder.layers.{}.self_attn.<q|k|v|out>_proj.<weight|bias>",
    "post_layernorm.<weight|bias>",
)
TEXT_NAMES = (
    "embed_tokens.weight",
    "layers.{}.self_attn.<q|k|v|o>_proj.weight",
    "layers.{}.mlp.<gate|up|down>_proj.weight",
    "layers.{}.<input|post_attention|pre_feedforward|post_feedforward>_layernorm.weight",
    "norm.weight",
)
PALIGEMMA_KEYS = KeyTable(
    moved("vision_tower.vision_model.", "vision_tower.", VISION_NAMES)
    | {"multi_modal_projector.linear.<weight|bias>": "="}
    | moved("language_model.model.", "language_model.", TEXT_NAMES)
    | {"language_model.lm_head.weight": None},  # the embedding again; hub.load checks
    spellings=(  # transformers 5 in a file, and 4.53 and later in memory
        (r"^model\.", ""),
        (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    ),
)

FUSION_NAMES = (
    "<image_dense|gate_dense|mha_layer.out_proj>.<weight|bias>",
    "mha_layer.in_proj_<weight|bias>",
)
MULTIMODAL_KEYS = KeyTable(
    {theirs: ours and f"t5.{ours}" for theirs, ours in T5_KEYS.rows.items()}
    | moved("encoder.", "fusion.", FUSION_NAMES),
    spellings=((r"^(image_dense|mha_layer|gate_dense)\.", r"encoder.\1."),),  # Feb 2023 checkpoints
)

TABLES = {
    "T5": T5_KEYS,
    "MultimodalT5": MULTIMODAL_KEYS,
    "DETR": DETR_KEYS,
    "ViT": VIT_KEYS,
    "PaliGemma": PALIGEMMA_KEYS,
}


def architecture(model_class: type) -> str:
    """The name under which tables have this class: its own, or that of a class it is made from.

    Raises ValueError for a class that no table knows.
    """
    for base in model_class.__mro__:
        if base.__name__ in TABLES:
            return base.__name__
    raise ValueError(
        f"{model_class.__name__} has no table of weight names in support/checkpoints/keys.py: "
        "add one to TABLES."
    )


def table_of(model_class: type) -> KeyTable:
    """The table of weight names of a model class; ValueError if there is none."""
    return TABLES[architecture(model_class)]


def file_path(model_class: type, path: str) -> str:
    """What the weight files on the Hub, and transformers 4, call our module at `path`."""
    return table_of(model_class).to_file(f"{path}.weight").removesuffix(".weight")


def transformers_path(model_class: type, path: str) -> str:
    """What transformers 5 calls our module at `path`; PEFT names adapters so."""
    if architecture(model_class) == "PaliGemma":
        return f"model.{path}"
    return file_path(model_class, path)
