"""Handwritten digits with a small convolutional network and Lightning."""

import argparse

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--lr", type=float, default=5e-3)
parser.add_argument("--accelerator", default="auto")
parser.add_argument("--out", default="runs/lightning")
parser.add_argument("--resume", help="a checkpoint of Lightning")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))

    def training_step(self, batch):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def test_step(self, batch):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        steps = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.AdamW(self.parameters(), lr=args.lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


lightning.seed_everything(args.seed)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target))
train, test = random_split(data, [len(data) - 360, 360], torch.Generator().manual_seed(0))

model = Digits()
callbacks = [lightning.pytorch.callbacks.ModelCheckpoint(every_n_epochs=1)]
trainer = lightning.Trainer(max_epochs=args.epochs, accelerator=args.accelerator, default_root_dir=args.out, callbacks=callbacks)
trainer.fit(model, DataLoader(train, args.batch_size, shuffle=True), ckpt_path=args.resume)
trainer.test(model, DataLoader(test, 360))
