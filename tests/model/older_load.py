"""Prints the logits and the ids that each folder gives, run by an older transformers.

python older_load.py TOKENS FOLDER…
"""

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.logging.set_verbosity_error()
results = []
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([json.loads(sys.argv[1])])).logits[0]
    ids = tokenizer("The Secretary shall file <|end|> § 12.").input_ids
    special = [
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        *sorted(tokenizer.all_special_ids),
    ]
    lost = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    results.append({"logits": logits.tolist(), "ids": ids, "special": special, "lost": lost})
print(json.dumps({"version": transformers.__version__, "results": results}))
