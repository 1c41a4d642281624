"""Handwritten digits with a small convolutional network, in a loop of one's own: half as many channels, weights of 4 to 8 bits."""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import geta

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--lr", type=float, default=5e-3)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--sparsity", type=float, default=0.5)
parser.add_argument("--out", default="runs/pytorch")
args = parser.parse_args()

torch.manual_seed(args.seed)
digits = load_digits()
images, labels = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target)
order = torch.randperm(len(images))
train, test = order[:-360], order[-360:]

layers = [nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))
steps = args.epochs * -(-len(train) // args.batch_size)
compressor = geta.Compressor(model, (images[:2],), sparsity=args.sparsity, weight_bits=(4, 8))
optimizer = compressor.optimizer(torch.optim.AdamW, lr=args.lr, total_steps=steps)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

for epoch in range(args.epochs):
    model.train()
    for batch in train[torch.randperm(len(train))].split(args.batch_size):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        scheduler.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

small = compressor.finish()
small.save(args.out)
with torch.no_grad():
    accuracy = (small.eval()(images[test]).argmax(1) == labels[test]).float().mean()
print(f"accuracy {accuracy:.4f}, {small.cost.params} parameters, {small.cost.weight_bytes} bytes of weights")
