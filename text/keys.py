"""The columns of rows and the keys of messages that are known: what each does, and which trainer writes it.

text/formats.py and text/messages.py read rows by these tables. A column that is not here is not used, and the
ledger lists it. A key of a message that is not here is passed to the chat template, and the ledger lists it
too. docs/data.md explains all of them.
"""

import difflib
import functools
import re
from typing import NamedTuple


class Key(NamedTuple):
    """Columns, or keys of messages, that mean the same."""

    names: str  # separated by blanks
    use: str  # what reads them, in text/formats.py and text/messages.py
    meaning: str
    writers: str  # trainers and data sets that have them


REASONS = "the reasoning before the answer"
UNSEEN = "refused: the model would be trained on answers about what it can't see"
DEPENDS = "refused if the prompt lacks its texts, as answers depend on them; not used otherwise"
ROW_KEYS = (
    Key("messages conversations conversation dialog dialogue chat", "messages",
        "the turns: a list, or its JSON", "OpenAI, TRL, ShareGPT, LLaMA-Factory, axolotl, ms-swift"),
    Key("prompt instruction question query problem", "prompt", "what is asked: a text, or a list of messages",
        "TRL, Alpaca, verl, ms-swift"),
    Key("response completion output answer solution target targets reply", "response",
        "what is trained: a text, or a list of messages", "TRL, Alpaca, verl, ms-swift, FLAN"),
    Key("input inputs context passage document", "context",
        "added to the prompt after a line break; it is the prompt if there is no other",
        "Alpaca, Dolly, SQuAD"),
    Key("history chat_history dialogue_history conversation_history", "history",
        'earlier turns, trained too: [["question", "answer"], ...], or messages',
        "LLaMA-Factory, ms-swift"),
    Key("system system_prompt system_message system_instruction sys_prompt", "system", "the system message",
        "LLaMA-Factory, ms-swift, OpenOrca"),
    Key("reasoning_content reasoning thinking cot complex_cot", "reasoning", REASONS, "DeepSeek, medical-o1"),
    Key("tools functions available_tools tools_json tool_list function_list", "tools",
        "tools that the model may call: a list, or its JSON", "OpenAI, TRL, LLaMA-Factory, ms-swift, verl"),
    Key("chat_template_kwargs", "kwargs", "variables of the chat template: an object, or its JSON",
        "TRL, ms-swift"),
    Key("enable_thinking preserve_thinking reasoning_effort", "kwarg", "one variable of the chat template",
        "verl, Qwen3, gpt-oss"),
    Key("label kto_tag", "label",
        "false: a bad answer, the row is dropped; a label that is not a boolean is not used",
        "TRL and LLaMA-Factory for KTO"),
    Key("train trainable", "train",
        "false, 0 or 0.0: the row is dropped; not used if it is another number or text", "axolotl"),
    Key("loss", "train", "false or 0: the row is dropped; not used if it is another number (0.0) or text",
        "axolotl"),
    Key("masked", "mask", "true, 1 or 1.0: the row is dropped; not used if it is another number or text",
        "torchtune"),
    Key("weight loss_weight sample_weight loss_scale", "weight", "multiplies the losses of the row",
        "OpenAI, LLaMA-Factory, ms-swift"),
    Key("text", "text", "plain text, if no other shape fits: every token is trained",
        "TRL, axolotl, LLaMA-Factory"),
    Key("input_ids", "tokens", "the row is tokenised already", "TRL, axolotl, ms-swift"),
    Key("labels", "labels", "of input_ids: -100 is no target, elsewhere equal to input_ids",
        "transformers, axolotl"),
    Key("loss_mask completion_mask assistant_masks assistant_mask", "token_mask",
        "of input_ids: 0 is no target, other numbers are weights", "TRL, verl, nanochat"),
    Key("attention_mask", "attention", "of input_ids: 1 everywhere, as rows have no padding", "transformers"),
    Key("position_ids", "positions", "of input_ids: 0, 1, 2, ...", "transformers"),
    Key("seq_lengths cu_seqlens", "packed",
        "of input_ids: refused if there are several documents in a row", "TRL"),
    Key("chosen rejected chosen_response rejected_response rejected_messages preferred_output "
        "non_preferred_output", "preference", "refused: pass the column with the better answer",
        "TRL, LLaMA-Factory, ms-swift, OpenAI"),
    Key("image images video videos audio audios pixel_values multi_modal_data", "media", UNSEEN,
        "TRL, LLaMA-Factory, LLaVA"),
    Key("segments", "refused", "refused: pieces of a text without template; write messages, or tokens",
        "axolotl"),
    Key("documents contexts passages article paragraph story background knowledge", "depends", DEPENDS,
        "Cohere, RAG data, RACE, HaluEval"),
    Key("choices options candidates endings choice_list option_list", "depends", DEPENDS,
        "MMLU, ARC, CommonsenseQA, HellaSwag"),
    Key("train_on_input train_on_inputs train_on_prompt", "refused",
        "refused: pass --train_on_prompt instead", "axolotl, LLaMA-Factory"),
)
MESSAGE_KEYS = (
    Key("role from", "role", "who speaks", "OpenAI, TRL; ShareGPT"),
    Key("content value text", "content", "what is said: a text, or a list of text parts",
        "OpenAI, TRL; ShareGPT"),
    Key("train training trainable train_on_turn loss", "train", "false: the turn is not trained",
        "axolotl, ms-swift, LLaMA-Factory"),
    Key("masked mask", "mask", "true: the turn is not trained", "torchtune"),
    Key("weight loss_weight loss_scale", "weight", "multiplies the losses of the turn; 0: not trained",
        "OpenAI, axolotl, LLaMA-Factory, ms-swift"),
    Key("reasoning_content thinking reasoning thought cot", "reasoning", REASONS, "DeepSeek, OpenAI, Qwen"),
    Key("tool_calls tool_call function_call", "calls", "calls of the assistant: a list, or its JSON",
        "OpenAI"),
    Key("channel", "channel", "final, or empty: anything else is refused, write it as reasoning_content",
        "gpt-oss"),
    Key("recipient", "recipient", "all, or empty: anything else is refused, write calls as tool_calls",
        "gpt-oss"),
    Key("name tool_call_id", "template", "passed to the chat template", "OpenAI"),
    Key("image images video videos audio audios", "media", UNSEEN, "ms-swift"),
    Key("tools functions", "refused", "refused: write them into the column tools of the row", "Hermes"),
    Key("train_detail training_detail", "refused", "refused: split the turn into messages instead",
        "axolotl"),
)
ROLES = {  # in lower case -> role; the content of a function_call is the JSON of calls
    **dict.fromkeys(("user", "human", "prompter", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "chatbot", "ai", "model", "answer"), "assistant"),
    **dict.fromkeys(("system", "developer", "system_prompt"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "tool_result", "function_response",
                     "tool_responses", "tool_results", "ipython", "environment"), "tool"),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls", "function_calls"), "function_call"),
}
ROLE_NAMES = tuple(ROLES)
# Other roles are the template's own, unless they look like one of these with a letter wrong
COMMON_ROLES = ("user", "human", "assistant", "system", "developer", "observation", "function")
CALL_ROLES = {name for name, role in ROLES.items() if role == "function_call"}
PAIRS = {  # keys of a turn that has both a question and its answer (ms-swift, XTuner) -> role
    "system": "system",
    **dict.fromkeys(("human", "user", "question", "prompt", "query", "instruction", "input"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "answer", "response", "output"), "assistant"),
}
NAMES = {"user": "user human", "assistant": "assistant gpt bot"}  # of columns, if there is no other pair
STRONG = {"response", "completion", "output"}  # beside one of these, "answer", "solution", ... are references

# Media have many more names: image_path, audio_url, video_files, ...
MEDIA = re.compile(r"(image|img|picture|photo|video|audio|speech|screenshot)s?"
                   r"(_?(id|url|path|file|list|byte|data|base64)s?)?$|(media|jpe?g|png|webp|wav|mp[34])$")
# A line of a prompt, or its beginning, that stands for media (LLaMA-Factory, ms-swift, LLaVA)
MEDIA_MARK = re.compile(r"(?:^|\n)\s*<(?:image|video|audio)>[ \t]*(?:\n|$)|^<image>|<image>$")
# Choices of a question in columns of their own, option_a, choice1, opa; and texts: retrieved_contexts
CHOICE = re.compile(r"(option|choice|ending)_?[a-j0-9]|op[a-e]|\w+_(context|passage|document|paragraph)s?")
# Unknown names that may say what is trained are errors. A row has columns of all kinds, so fewer count there.
DOUBTFUL_IN_ROW = re.compile(
    r"(^|_)masks?$|^mask_|^weights$|_to_train$|(^|_)(loss|train(able|ed)?)_(mask|weight|scale|flag|on|turn)")
DOUBTFUL_IN_MESSAGE = re.compile(
    r"loss|train|mask|weight|label|target|ignore|skip|learn|supervis|exclude|no_grad")
ROW = {name: key for key in ROW_KEYS for name in key.names.split()}
MESSAGE = {name: key for key in MESSAGE_KEYS for name in key.names.split()}


@functools.lru_cache(4096)
def plain(name):
    """The name of a column or key as the tables write it: " System Prompt" is system_prompt."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


@functools.lru_cache(4096)
def nearest(name, known):
    """The one of a tuple of known names that this one may be, misspelled, or None."""
    return next(iter(difflib.get_close_matches(plain(name[:60]), known, n=1, cutoff=0.8)), None)


def misspelled(name):
    """The known column that an unknown one may be, or the known key for "messages.KEY"; None if none.

    A known name with more letters, as in context_id, is another word.
    """
    key = name.removeprefix("messages.")
    near = nearest(key, tuple(ROW if key == name else MESSAGE))
    return near if near and near not in plain(key) else None


@functools.lru_cache(4096)
def row_use(name):
    """What a column is used for, or None. Upper and lower case, and blanks around it, are the same."""
    name = plain(name)
    if name in ROW:
        return ROW[name].use
    if MEDIA.match(name):
        return "media"
    if CHOICE.fullmatch(name):
        return "depends"
    return "doubtful" if DOUBTFUL_IN_ROW.search(name) else None


@functools.lru_cache(4096)
def message_use(name):
    """What a key of a message is used for, or None."""
    name = plain(name)
    if name in MESSAGE:
        return MESSAGE[name].use
    if MEDIA.match(name):
        return "media"
    return "doubtful" if DOUBTFUL_IN_MESSAGE.search(name) else None
