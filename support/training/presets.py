"""Settings of the published runs of Multimodal-CoT, one table row each; flags override them.

Sources. Version 1: the commands in amazon-science/mm-cot's README until August 2023, run on two
GPUs, and arXiv 2302.00923v1 for what they leave out. Version 2: its run_training.sh since then,
and the TMLR paper. What it all means is in docs/multimodal-cot.md, with what differs here.
"""

V1 = {  # UnifiedQA and DETR
    "data": "scienceqa",
    "recipe": "two-stage",  # --prompt_format QCM-LE, then QCMG-A
    "vision": "detr",  # --img_type detr
    "captions": "none",  # no --use_caption
    "max_input": 512,  # main.py's default
    "max_output": (512, 64),  # --output_len
    "epochs": (20.0,),  # main.py's default
    "keep_epoch": ("last",),  # --final_eval
    "batch_size": (16,),  # --bs 8 on two GPUs
    "accumulate": 1,
    "lr": (5e-5,),  # main.py's default
    "weight_decay": 0.01,  # fixed in main.py
}
V2 = V1 | {  # FLAN-Alpaca, ViT and InstructBLIP's captions
    "recipe": "two-stage-e",  # --prompt_format QCM-E, then QCMG-A
    "vision": "vit",  # --img_type vit
    "captions": "instruct",  # --use_caption --caption_file data/instruct_captions.json
    "eval_problems": 4241,  # all of val are decoded where the best epoch is kept
}
PRESETS = {
    "v1-base": {**V1, "weights": ("allenai/unifiedqa-t5-base",)},
    # No command was published for it; the paper gives the same settings for both sizes.
    "v1-large": {**V1, "weights": ("allenai/unifiedqa-t5-large",)},
    "v2-base": {
        **V2,
        "weights": ("declare-lab/flan-alpaca-base",),
        "keep_epoch": ("last", "best"),  # --final_eval in stage 1 only
        "batch_size": (8,),  # one GPU
        "lr": (8e-5,),
    },
    "v2-large": {
        **V2,
        "weights": ("declare-lab/flan-alpaca-large",),
        "epochs": (50.0,),
        "keep_epoch": ("best",),  # by ROUGE-L, then by accuracy
        "batch_size": (8, 16),  # --bs 2 and 4 on four GPUs
        "lr": (5e-5,),
    },
}
# The weights that the authors, or others for them, put on the Hub, with the features they learned
# from; they are only decoded. The zip files hold version 2.
HUB = "acheong08/mm-cot"
RELEASED = {
    "v1-base": {
        "weights": (f"{HUB}/models/rationale", f"{HUB}/models/answer"),
        "features": f"{HUB}/vision_features/detr.npy",
    },
    "v2-base": {
        "weights": (
            "cooelf/mm-cot/mm-cot-base-rationale.zip",
            "cooelf/mm-cot/mm-cot-base-ans.zip",
        ),
        "features": "cooelf/vision_features/vit.pth",
    },
    "v2-large": {
        "weights": (
            "cooelf/mm-cot/mm-cot-large-rationale.zip",
            "cooelf/mm-cot/mm-cot-large-answer.zip",
        ),
        "features": "cooelf/vision_features/vit.pth",
    },
}
for name, released in RELEASED.items():
    maps = {"name_map": f"{HUB}/vision_features/name_map.json", "epochs": (0.0,)}
    PRESETS[f"{name}-released"] = {**PRESETS[name], **released, **maps}
