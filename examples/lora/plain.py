"""Fine-tune a small Llama through low-rank adapters (PEFT), here on the second half of Python's own documentation."""

import argparse
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--base", help="folder of a pretrained model of bytes; without it a small one is trained first")
parser.add_argument("--base-steps", type=int, default=200)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--block", type=int, default=64, help="bytes that the model sees")
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--lr", type=float, default=3e-3)
parser.add_argument("--out", default="runs/lora")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

torch.manual_seed(args.seed)
text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
first, second, test = text[: len(text) // 2], text[len(text) // 2 : -8000], text[-8000:]


def fit(model, optimizer, tokens, steps):
    model.train()
    for step in range(steps):
        starts = torch.randint(len(tokens) - args.block, (args.batch_size,))
        batch = torch.stack([tokens[start : start + args.block] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}")


def test_loss(model):
    batch = test[: len(test) // args.block * args.block].view(-1, args.block)
    with torch.no_grad():
        return model.eval()(input_ids=batch, labels=batch).loss.item()


sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "max_position_embeddings": args.block}
config = LlamaConfig(vocab_size=256, num_attention_heads=8, num_key_value_heads=4, use_cache=False, **sizes)
base = AutoModelForCausalLM.from_pretrained(args.base) if args.base else LlamaForCausalLM(config)
if not args.base:
    fit(base, torch.optim.AdamW(base.parameters(), lr=args.lr), first, args.base_steps)

layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = get_peft_model(base, LoraConfig(r=args.rank, target_modules=layers, task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.lr)
fit(model, optimizer, second, args.steps)
print(f"test loss {test_loss(model):.3f}")
merged = model.merge_and_unload()
merged.save_pretrained(args.out)
print(f"{sum(p.numel() for p in merged.parameters())} parameters")
