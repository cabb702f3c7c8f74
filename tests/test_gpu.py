"The list of what waits for a GPU: what is done, and what is written"
import shutil
from functools import partial
from io import StringIO
from pathlib import Path

import pandas as pd, pytest
from rich.console import Console

from phantom_nb.experiments import gpu, runner
from phantom_nb.experiments.store import load_results, write_rows
from phantom_nb.experiments.sweep import load_sweep

PIECE = gpu.Piece('small', "a small sweep", 'sweep', 'small')

@pytest.fixture
def folder(tmp_path):
    (tmp_path/'small.toml').write_text('methods = ["none","dropout"]\nseeds = 2\nepochs = 1\nn_train = 40\n')
    return tmp_path

def test_a_sweep_is_done_when_all_its_runs_are_recorded(folder):
    assert not gpu.is_done(PIECE, folder)
    console = Console(file=StringIO())
    assert gpu.run_piece(PIECE, folder, console) and gpu.is_done(PIECE, folder)
    rows = load_results(folder/'small.jsonl')
    assert set(rows.key) == {run.key for run in load_sweep(folder/'small.toml').runs}
    write_rows(rows.iloc[:3], folder/'small.jsonl')
    assert not gpu.is_done(PIECE, folder)

def test_a_part_replaces_nothing(folder, monkeypatch):
    gpu.run_piece(PIECE, folder, Console(file=StringIO()))
    before = (folder/'small.jsonl').read_text()
    part = load_results(folder/'small.jsonl').iloc[:2]
    monkeypatch.setattr(gpu, 'run_sweep', lambda *args, **kwargs: (part, pd.DataFrame()))
    assert not gpu.run_piece(PIECE, folder, Console(file=StringIO()))
    assert (folder/'small.jsonl').read_text() == before

def test_another_machine_goes_on_from_the_recorded_rows(folder, monkeypatch):
    gpu.run_piece(PIECE, folder, Console(file=StringIO()))
    rows = load_results(folder/'small.jsonl')
    write_rows(rows.iloc[:3], folder/'small.jsonl')
    shutil.rmtree(folder/'.gpu')
    trained = []
    train_run = runner.train_run
    monkeypatch.setattr(runner, 'train_run', lambda run, *args, **kwargs: trained.append(run.key) or train_run(run, *args, **kwargs))
    monkeypatch.setattr(gpu, 'run_sweep', partial(gpu.run_sweep, jobs=1))
    assert gpu.run_piece(PIECE, folder, Console(file=StringIO()))
    assert trained==[rows.key.iloc[3]] and len(load_results(folder/'small.jsonl'))==4

def test_benchmarks_are_done_when_there_are_rows(tmp_path, monkeypatch):
    piece = gpu.PIECES['step']
    monkeypatch.setattr(gpu, 'bench_step', lambda: pd.DataFrame([dict(method='mhe', cost=.04)]))
    assert not gpu.is_done(piece, tmp_path)
    assert gpu.run_piece(piece, tmp_path, Console(file=StringIO())) and gpu.is_done(piece, tmp_path)
    assert (tmp_path/'gpu-step.jsonl').exists()

def test_every_sweep_of_the_list_is_there():
    folder = Path(__file__).parents[1]/'results'
    lost = [p.target for p in gpu.PIECES.values() if p.kind=='sweep' and not (folder/f'{p.target}.toml').exists()]
    assert not lost
