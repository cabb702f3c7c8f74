"Cards of methods: what is found by calling, what is read from rows"
import pandas as pd, pytest
from test_project import ROOT

from phantom_nb.experiments.cards import cost_words, effect_words, failure_words, looks_at, method_card, pair_words, way_words
from phantom_nb.experiments.methods import METHODS
from phantom_nb.experiments.pairs import FAMILIES
from phantom_nb.experiments.suggest import load_table

@pytest.mark.parametrize('name,acts,labels', [('mhe','weights','no'), ('phantom_pull','activations','yes'), ('targeted_sparsity','activations','no'),
    ('isda','outputs, in place of the loss','yes'), ('sam','gradient, by a second pass','no more than the loss'),
    ('normalize_project','weights, after each step','no'), ('mixup','images and labels','yes'), ('weight_decay','weights','no')])
def test_what_a_method_looks_at_is_found(name, acts, labels): assert looks_at(name)==(acts, labels)

def test_numbers_are_those_of_the_rows():
    effects = load_table()['methods']['half_mhe']['effects']
    assert all(f"{told['diff']:+.1f} ± {told['half']:.1f}" in effect_words('half_mhe') for told in effects.values())
    costs = pd.read_json(ROOT/'results/bench-rivals.jsonl', lines=True)
    last = costs[costs.method=='sam'].iloc[-1]
    assert f"{100*last.cost:+.0f} %" in cost_words('sam', ROOT)
    pairs = pd.read_json(ROOT/'results/pairs.jsonl', lines=True)
    assert len(pairs)==len(FAMILIES)*(len(FAMILIES)-1)//2
    assert pair_words('isda', ROOT).startswith(f'{((pairs[["first","second"]]=="isda").any(axis=1) & (pairs.outcome=="works")).sum()} of 20 others; not ')
    assert pair_words('asam', ROOT)==pair_words('sam', ROOT)
    assert 'not MixUp, CutMix, torch.compile' in way_words('isda', ROOT)
    assert failure_words('sam', ROOT).startswith('`rho` too large')

def test_every_method_has_a_whole_card():
    known = {line for name in METHODS if name!='none' for line,told in method_card(name, ROOT).items() if told!='-'}
    assert known=={'what it is','paper','acts on','needs labels','defaults','range','cost of a step','effect','goes with','works in','fails as'}
    with pytest.raises(ValueError, match='half_mhe'): method_card('halfmhe', ROOT)
