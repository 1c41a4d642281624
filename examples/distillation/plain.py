"""Handwritten digits: train a network, then train it on with a lower learning rate."""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=15)
parser.add_argument("--more-epochs", type=int, default=15)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--lr", type=float, default=5e-3)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

torch.manual_seed(args.seed)
digits = load_digits()
images, labels = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target)
order = torch.randperm(len(images))
train, test = order[:-360], order[-360:]


def fit(model, optimizer, epochs, criterion):
    model.train()
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(args.batch_size):
            optimizer.zero_grad()
            criterion(model(images[batch]), batch).backward()
            optimizer.step()


def report(name, model):
    with torch.no_grad():
        accuracy = (model.eval()(images[test]).argmax(1) == labels[test]).float().mean()
    print(f"{name}: accuracy {accuracy:.4f}")


def from_labels(scores, batch):
    return F.cross_entropy(scores, labels[batch])


layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))
fit(model, torch.optim.AdamW(model.parameters(), lr=args.lr), args.epochs, from_labels)
report("trained", model)

optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr / 2)
fit(model, optimizer, args.more_epochs, from_labels)
report("trained on", model)
