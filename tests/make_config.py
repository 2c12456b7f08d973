"""Write config.yaml: every setting of sft.py with its default and its help text.

    python tests/make_config.py
"""

import dataclasses
import os
import sys
import textwrap

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

HEAD = """\
# Every setting with its default. Edit a copy and start with: python sft.py --config my.yaml
# A flag (--lr 1e-5) or lr=1e-5 on the command line overrides this file. Written by tests/make_config.py.
"""


def text(config):
    """The content of config.yaml for a dataclass of settings."""
    lines = [HEAD]
    for field in dataclasses.fields(config):
        value = "null" if field.default is None else str(field.default)
        value = value.lower() if type(field.default) is bool else value
        choices = f" ({', '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
        if field.metadata["group"]:
            lines.append(f"\n# {field.metadata['group']}\n")
        assignment = f"{field.name}: {value}".ljust(36) + "# "
        comment = textwrap.wrap(field.metadata["help"] + choices, 72)
        lines.append(assignment + f"\n{'#':>37} ".join(comment) + "\n")
    return "".join(lines)


if __name__ == "__main__":
    import sft

    with open(os.path.join(ROOT, "config.yaml"), "w", encoding="utf-8") as f:
        f.write(text(sft.Config))
