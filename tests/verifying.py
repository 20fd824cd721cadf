"What `llmft verify` computes again of each kind of run, for the tests that make such a run."

from llmft.cli import _again_of
from llmft.core import read_json
from llmft.runs.checks import number_checks
from llmft.runs.identity import read_record

recomputed = dict(  # experiment -> the metrics that are computed again
    finetune={'loss_after', 'perplexity_after'},
    pretrain={'valid_loss', 'valid_perplexity'},
    pdf_finetune={'loss_after', 'perplexity_after'},
    instruct={'eval_loss', 'test_loss'},
    forecast_train={'valid_mae', 'valid_mae_median'},
    forecast_eval={'mae', 'mae_median'},
    inference={'perplexity', 'bits_per_byte'},
    sublora_train={'valid_bits_after'},
    sublora_bounds={'bound_value', 'top1_error', 'held_out_bpd', 'verified'},
)


def assert_computed_again(notebook, folder):
    "Fail unless every number of a finished run of `notebook` comes out again."
    record = read_record(folder)
    assert record['run']['notebook'] == notebook
    checks = number_checks(folder, record, read_json(folder / 'metrics.json'), _again_of(folder))
    assert recomputed[notebook] <= {check.what for check in checks}, [str(check) for check in checks]
    assert all(check.status == 'ok' for check in checks), [str(check) for check in checks]
