"""A classifier of two interleaved half-moons, trained on nodes that come and go. Its only import of ours is `Elastic`.

elastic-gpt run examples/own_model.py runs/moons
elastic-gpt launch --nodes 3 -- run examples/own_model.py runs/moons
"""

import sys

import torch
from torch.nn.functional import cross_entropy

from elastic_gpt import Elastic

torch.manual_seed(1)
turn = torch.rand(2000) * torch.pi
upper = torch.stack([turn.cos(), turn.sin()], 1)
points = torch.cat([upper, torch.tensor([1.0, 0.5]) - upper]) + 0.1 * torch.randn(4000, 2)
labels = torch.arange(4000) // 2000
data = torch.utils.data.TensorDataset(points, labels)

model = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(32, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 300

run = Elastic(sys.argv[1], model, optimizer, data, steps=steps, global_batch=64, micro_batch=8, exact=True)
for step in run:
    for inputs, targets in step:
        step.backward(cross_entropy(model(inputs), targets, reduction="sum"))
    step.update()

with torch.no_grad():
    print(f"right: {(model.eval()(points).argmax(1) == labels).float().mean():.1%}")
