"""A small Llama learns to write Python's own documentation, byte by byte, with the Trainer of transformers, and gets smaller meanwhile."""

import argparse
import math
from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import geta
from geta.integrations.trainer import GetaCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--hidden", type=int, default=64)
parser.add_argument("--layers", type=int, default=2)
parser.add_argument("--block", type=int, default=64, help="bytes that the model sees")
parser.add_argument("--blocks", type=int, default=2000, help="how many of them to train on")
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--lr", type=float, default=3e-3)
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--out", default="runs/hf_trainer")
parser.add_argument("--resume", help="a checkpoint folder of the Trainer")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--sparsity", type=float, default=0.5)
args = parser.parse_args()

text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
blocks = [{"input_ids": block, "labels": block} for block in text[: len(text) // args.block * args.block].split(args.block)]
train, test = blocks[: args.blocks], blocks[-100:]

torch.manual_seed(args.seed)
sizes = {"hidden_size": args.hidden, "intermediate_size": 3 * args.hidden, "num_hidden_layers": args.layers}
heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": args.block}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, **heads))

settings = TrainingArguments(
    args.out,
    num_train_epochs=args.epochs,
    per_device_train_batch_size=args.batch_size,
    gradient_accumulation_steps=args.accumulate,
    learning_rate=args.lr,
    lr_scheduler_type="cosine",
    warmup_steps=0.1,
    bf16=args.bf16,
    logging_steps=25,
    save_steps=100,
    report_to="none",
    seed=args.seed,
)
trainer = Trainer(model, settings, train_dataset=train, eval_dataset=test)
example = {"input_ids": torch.stack([train[0]["input_ids"], train[1]["input_ids"]])}
compressor = geta.Compressor(model, kwargs=example, sparsity=args.sparsity, weight_bits=(4, 8))
callback = GetaCallback(compressor).attach(trainer)
trainer.train(resume_from_checkpoint=args.resume)
print(f"perplexity per byte {math.exp(trainer.evaluate()['eval_loss']):.3f}")
small = callback.finish()
if trainer.is_world_process_zero():
    small.save(f"{args.out}/small")
