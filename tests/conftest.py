"What all tests share"
import random
import numpy as np, pytest, torch

@pytest.fixture(autouse=True)
def seeded():
    "The same random numbers for a test whatever ran before it"
    for f in (random.seed, np.random.seed, torch.manual_seed): f(0)
