"""Small multimodal model directories, made with transformers; what a checkpoint must keep of them."""

import json
import re
import shutil

import torch
import transformers
from helpers import TINY
from safetensors.torch import load_file, save_file

from disk import pretrained
from families import config

TEXT = dict(vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=4096)
SIGLIP = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=16,
              patch_size=8)
KINDS = {  # name: values of config.json; its model_type is the name up to the first space
    "mistral3 of ministral3": dict(text_config=dict(TEXT, model_type="ministral3"),
                                   vision_config=dict(SIGLIP, model_type="pixtral", head_dim=8)),
    "mistral3": dict(text_config=dict(TEXT, model_type="mistral", sliding_window=None, tie_word_embeddings=False),
                     vision_config=dict(SIGLIP, model_type="pixtral", head_dim=8), tie_word_embeddings=False),
    "gemma3": dict(text_config=dict(TEXT, layer_types=["sliding_attention", "full_attention"]), vision_config=SIGLIP,
                   mm_tokens_per_image=4),
    "qwen3_5": dict(text_config=dict(TEXT, layer_types=["linear_attention", "full_attention"],
                                     linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
                                     linear_value_head_dim=8),
                    vision_config=dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32,
                                       patch_size=4, num_position_embeddings=16), tie_word_embeddings=False),
    "gemma4": dict(text_config=dict(TEXT, global_head_dim=16, layer_types=["sliding_attention", "full_attention"],
                                    hidden_size_per_layer_input=0, num_kv_shared_layers=0),
                   vision_config=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
                                      num_key_value_heads=2, head_dim=8, patch_size=4, position_embedding_size=16)),
}
READ = [kind for kind in KINDS if kind.split()[0] in config.NESTED]  # those whose text model is supported
PROCESSOR = {"preprocessor_config.json": b'{"size":  1}\r\n', "processor_config.json": b'{"b": 1, "a": 2.50}',
             "video_preprocessor_config.json": b"{}", "chat_template.json": b'{"chat_template": ""}'}
# The prefixes of text model and head in files: of transformers 5 in memory, of published ones, of older versions
SPELLINGS = {"model.language_model.": "lm_head.weight", "language_model.model.": "language_model.lm_head.weight",
             "model.": "lm_head.weight"}
IS_TEXT = re.compile(r"(model\.language_model|language_model\.model|model)\.(layers|embed_tokens|norm)\b.*|"
                     r"(language_model\.)?lm_head\.weight")


def multimodal(directory, kind, spelling=None, files=1):
    """Write a directory of a multimodal model with random weights; return it.

    spelling  the prefix of the text model, one of SPELLINGS; None: as transformers saves it
    files     the number of weight files

    Beside the model's own tensors there are some of a head for further tokens, and some of dtypes that no weight has.
    """
    torch.manual_seed(0)
    values = transformers.AutoConfig.for_model(kind.split()[0], **KINDS[kind])
    model = transformers.AutoModelForImageTextToText.from_config(values)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    if spelling:
        tensors = {spelled(name, spelling): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor.bfloat16() if "layers.1" in name else tensor for name, tensor in tensors.items()}
    tensors["mtp.layers.0.self_attn.q_proj.weight"] = torch.randn(64, 32)
    tensors["mtp.norm.weight"] = torch.randn(32)
    tensors["vision_tower.scale"] = torch.randn(4, 4).to(torch.float8_e4m3fn)
    tensors["vision_tower.positions"] = torch.arange(5)
    (directory / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors" if files > 1 else "model.safetensors"
        part = {name: tensors[name] for name in names[i::files]}
        save_file(part, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    if files > 1:
        (directory / pretrained.INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{TINY}/{name}", directory)
    for name, content in PROCESSOR.items():
        (directory / name).write_bytes(content)
    return directory


def spelled(name, prefix):
    """The name of a tensor in files whose text model has this prefix."""
    if name.endswith("lm_head.weight"):
        return SPELLINGS[prefix]
    return re.sub(r"^(model\.language_model|language_model\.model)\.", prefix, name)


def raw_tensors(directory):
    """{name: (file, dtype, shape, bytes)} of all tensors in a directory's weight files."""
    result = {}
    for path in sorted(directory.glob("model*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            result[name] = path.name, entry["dtype"], tuple(entry["shape"]), data[start:stop]
    return result


def check_kept(directory, step, frozen=(), same_files=True):
    """Assert that a checkpoint has the tensors of a directory, and that exactly the trained ones have other values.

    frozen      parts of names of text tensors that were not trained
    same_files  whether each tensor is in the file of the same name
    """
    before, after = raw_tensors(directory), raw_tensors(step)
    assert before.keys() == after.keys()
    first = 0 if same_files else 1
    for name, tensor in before.items():
        # Gemma 4's layer_scalar is a buffer in transformers, which training does not change
        is_trained = IS_TEXT.fullmatch(name) and not any(part in name for part in (*frozen, "layer_scalar"))
        assert tensor[first:3] == after[name][first:3], name
        assert (tensor[3] != after[name][3]) == bool(is_trained), name
    for name in ("config.json", *PROCESSOR):
        assert (step / name).read_bytes() == (directory / name).read_bytes(), name


def loading_info(directory):
    """What transformers says about missing and unexpected tensors."""
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    return model, {key: sorted(names) for key, names in info.items()}
