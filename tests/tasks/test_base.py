import pytest
import torch

from lightning_compress.tasks.base import TransformerTask
from tests.toys import tiny_bert, toy_loader, toy_trainer


class TinyTask(TransformerTask):
    """A task whose model is a toy."""

    num_built = 0

    def __init__(self, **settings) -> None:
        super().__init__(
            **{"learning_rate": 1e-3, "weight_decay": 0.1, "warmup_ratio": 0.5, "attention_dropout": 0.0}
            | settings
        )

    def build_model(self):
        self.num_built += 1
        return tiny_bert()

    def training_step(self, batch, batch_idx):
        return self(**batch).loss


def test_a_task_that_says_nowhere_what_its_model_is_cannot_be_made():
    with pytest.raises(TypeError, match="build_model"):
        TransformerTask(1e-3, 0.1, 0.5, 0.0)


def test_the_model_is_built_once_and_in_training_mode():
    task = TinyTask()
    assert task.model is None
    task.configure_model()
    model = task.model
    task.configure_model()
    assert task.model is model
    assert (task.num_built, model.training) == (1, True)


def test_every_parameter_is_optimised_and_the_rate_follows_the_whole_training():
    task = TinyTask()
    trainer = toy_trainer(max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(task, toy_loader(size=32, batch_size=4))
    (optimizer,), (schedule,) = trainer.optimizers, trainer.lr_scheduler_configs
    optimised = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in optimised} == {id(p) for p in task.parameters()}
    assert len(optimised) == len({id(p) for p in optimised})
    assert schedule.interval == "step"
    assert trainer.global_step == 8
    assert schedule.scheduler.get_last_lr() == [0.0, 0.0]


def test_without_a_trainer_there_is_no_data_module():
    assert TinyTask().datamodule is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0, got 0.0"),
        ({"weight_decay": -0.1}, "`weight_decay` must be 0 or more, got -0.1"),
        ({"warmup_ratio": 1.0}, r"`warmup_ratio` must be in \[0, 1\), got 1.0"),
        ({"attention_dropout": -1.0}, r"`attention_dropout` must be in \[0, 1\), got -1.0"),
    ],
)
def test_arguments_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TinyTask(**settings)


def test_the_forward_pass_is_the_model_s():
    task = TinyTask()
    task.configure_model()
    task.eval()
    batch = next(iter(toy_loader()))
    assert torch.equal(task(**batch).logits, task.model(**batch).logits)
