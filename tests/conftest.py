"""Before any test: many import torchvision themselves, beside a torch that may be CPU-only."""

import dist_lab

dist_lab.fix_torchvision()
