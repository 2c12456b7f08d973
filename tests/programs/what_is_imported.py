"""Runs sft.py and prints which slow modules it has imported: what_is_imported.py [flags of sft.py]

No fault is planted.
"""

import sys

import sft

SLOW = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "transformers", "huggingface_hub",
        "tools.plan")

sft.main()
print("RESULT", [name for name in SLOW if name in sys.modules])
