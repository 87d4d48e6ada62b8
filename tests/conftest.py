"""What holds for all tests: one thread for each process, as the networks are tiny and cores are few."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the programs that tests start

import cv2
import torch

torch.set_num_threads(1)
cv2.setNumThreads(0)
