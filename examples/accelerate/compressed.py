"""Handwritten digits with a small convolutional network and accelerate, smaller at the end: `accelerate launch compressed.py`."""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import geta

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--accumulate", type=int, default=2)
parser.add_argument("--lr", type=float, default=5e-3)
parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16"])
parser.add_argument("--cpu", action="store_true")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--sparsity", type=float, default=0.5)
parser.add_argument("--out", default="runs/accelerate")
args = parser.parse_args()

accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.accumulate)
set_seed(args.seed)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target))
train, test = random_split(data, [len(data) - 360, 360], torch.Generator().manual_seed(0))
train, test = accelerator.prepare(DataLoader(train, args.batch_size, shuffle=True), DataLoader(test, 360))
steps = args.epochs * -(-len(train) // args.accumulate)

layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))
compressor = geta.Compressor(model, (torch.zeros(2, 1, 8, 8),), sparsity=args.sparsity, weight_bits=(4, 8))
optimizer = compressor.optimizer(torch.optim.AdamW, lr=args.lr, total_steps=steps)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * accelerator.num_processes)
model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

for epoch in range(args.epochs):
    model.train()
    for images, labels in train:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

model.eval()
right = 0
for images, labels in test:
    with torch.no_grad():
        right += accelerator.gather_for_metrics(model(images).argmax(1) == labels).sum().item()
accelerator.print(f"accuracy {right / 360:.4f}")
small = compressor.finish()
accelerator.print(f"{small.cost.params} parameters, {small.cost.weight_bytes} bytes of weights")
if accelerator.is_main_process:
    small.save(args.out)
