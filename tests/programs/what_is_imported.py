"""A run of sft.py with the flags given; prints which of the modules that cost time to import are there at its end.

Nothing is planted.
"""

import sys

import sft

SLOW = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "transformers", "huggingface_hub",
        "tools.plan")

sft.main()
print("RESULT", [name for name in SLOW if name in sys.modules])
