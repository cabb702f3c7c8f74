"The list of what waits for a GPU: what is done, and what is written"
import os, shutil
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
    run_sweep = gpu.run_sweep
    monkeypatch.setattr(gpu, 'run_sweep', lambda *args, **kwargs: run_sweep(*args, **kwargs | dict(jobs=1)))
    assert gpu.run_piece(PIECE, folder, Console(file=StringIO()))
    assert trained==[rows.key.iloc[3]] and len(load_results(folder/'small.jsonl'))==4

@pytest.mark.parametrize('code', [0, 1])
def test_the_service_is_ended_if_it_was_started_here(tmp_path, monkeypatch, code):
    "A stand-in on the path notes how it is called; after an error, too"
    said,fake = tmp_path/'said',tmp_path/gpu.SERVICE
    fake.write_text(f'#!/bin/sh\nif [ "$1" = -d ]; then echo start >> {said}; exit {code}; fi\ncat >> {said}\n')
    fake.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    with pytest.raises(KeyError):
        with gpu.shared_gpu():
            assert said.read_text()=='start\n'
            raise KeyError
    assert said.read_text()==('start\nquit\n' if code==0 else 'start\n')

def test_without_the_service_nothing_is_started(monkeypatch):
    monkeypatch.setenv('PATH', '')
    with gpu.shared_gpu(): pass

def test_jobs_leave_a_core(monkeypatch):
    monkeypatch.setattr(gpu.joblib, 'cpu_count', lambda **kwargs: 16)
    assert gpu.jobs_of_a_piece() is None
    monkeypatch.setattr(gpu.torch.cuda, 'is_available', lambda: True)
    assert gpu.jobs_of_a_piece()==15

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
