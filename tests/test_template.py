"The template of a page: a copy of it exports a regularizer that keeps all nine promises"
import sys, pytest
import test_project as project

@pytest.mark.processes
def test_a_copy_exports_and_passes_the_contract(tmp_path):
    root = project.copy_tree(tmp_path)
    text = (project.ROOT/'nbs/tutorials/template.ipynb').read_text(encoding='utf-8')
    assert text.count('#-|')==5 # four cells, and the sentence on them
    page = root/'nbs/regularizers/lasso.ipynb'
    page.write_text(text.replace('#-|', '#|').replace('regularizers.NAME', 'regularizers.lasso'), encoding='utf-8')
    for rule in ('first_cell_is_a_title_and_one_line','lines_and_functions_are_short','public_parameters_have_types','code_is_not_golfed'):
        getattr(project, f'test_{rule}')(page)
    project.tool(root, sys.executable, '-c', "from nbdev.export import nb_export; nb_export('nbs/regularizers/lasso.ipynb', lib_path='phantom_nb')")
    program = 'from phantom_nb.contract import check_regularizer; from phantom_nb.regularizers.lasso import Lasso; print(set(check_regularizer(Lasso).result))'
    assert "{'kept'}" in project.tool(root, sys.executable, '-c', program)
