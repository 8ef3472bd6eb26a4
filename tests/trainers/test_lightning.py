"""Lightning, unchanged: a module with a network in a subspace, or with its handle."""

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.optim import Adam

from subspan import SubspaceModel
from tests.nets import build
from tests.trainers.test_accelerate import rows

pytestmark = pytest.mark.filterwarnings("ignore")
lightning = pytest.importorskip(
    "lightning", reason="lightning is not installed: pip install lightning"
)
from lightning.pytorch import callbacks  # noqa: E402

both = pytest.mark.parametrize("through", ["network", "handle"])


class Module(lightning.LightningModule):
    """A module as people write it."""

    def __init__(self, through="handle"):
        super().__init__()
        self.save_hyperparameters()
        model = SubspaceModel(build("mlp"), 12)
        self.net = model if through == "handle" else model.body

    def training_step(self, batch, _):
        loss = mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    validation_step = training_step

    def predict_step(self, batch, _):
        return self.net(batch[0])

    def configure_optimizers(self):
        return Adam(self.parameters(), lr=0.1)

    @property
    def model(self):
        return SubspaceModel.of(self.net)

    @property
    def coordinates(self):
        return self.model.coordinates["global"].detach().clone()


def trainer(folder, **options):
    given = {"accelerator": "cpu", "logger": False, "max_epochs": 2}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(default_root_dir=folder, **given | quiet | options)


def plain(epochs=2):
    """The coordinates after a plain loop."""
    module = Module()
    optimizer = module.configure_optimizers()
    for _ in range(epochs):
        for batch in rows(8):
            optimizer.zero_grad()
            mse_loss(module.net(batch[0]), batch[1]).backward()
            optimizer.step()
    return module.coordinates


@both
def test_training_is_that_of_a_plain_loop(through, tmp_path):
    module = Module(through)
    running = trainer(tmp_path, enable_checkpointing=False)
    running.fit(module, rows(8), rows(8))
    assert torch.equal(module.coordinates, plain())
    [first, *_] = running.predict(module, rows(8))
    torch.testing.assert_close(first, module.model.merge()(next(iter(rows(8)))[0]))


@both
def test_an_interrupted_training_goes_on_exactly(through, tmp_path):
    trainer(tmp_path, max_epochs=1).fit(Module(through), rows(8))
    [file] = (tmp_path / "checkpoints").glob("*.ckpt")
    assert file.stat().st_size < 15_000
    again = Module(through)
    trainer(tmp_path).fit(again, rows(8), ckpt_path=file)
    assert torch.equal(again.coordinates, plain())
    loaded = Module.load_from_checkpoint(file)
    assert loaded.hparams.through == through
    assert torch.equal(loaded.coordinates, plain(1))


@both
def test_checkpoints_of_weights_alone(through, tmp_path):
    best = callbacks.ModelCheckpoint(tmp_path, monitor="loss", save_weights_only=True)
    module = Module(through)
    trainer(tmp_path, callbacks=[best]).fit(module, rows(8), rows(8))
    loaded = Module.load_from_checkpoint(best.best_model_path)
    assert torch.equal(loaded.coordinates, module.coordinates)


@both
@pytest.mark.parametrize("how", ["averages", "moving averages", "mixed precision", "accumulation"])
def test_what_people_switch_on(through, how, tmp_path):
    options = {
        "averages": {"callbacks": [callbacks.StochasticWeightAveraging(0.1, swa_epoch_start=1)]},
        "moving averages": {"callbacks": [callbacks.EMAWeightAveraging()]},
        "mixed precision": {"precision": "bf16-mixed"},
        "accumulation": {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0},
    }[how]
    module = Module(through)
    trainer(tmp_path, max_epochs=4, enable_checkpointing=False, **options).fit(module, rows(8))
    assert module.coordinates.abs().min() > 0
    x, _ = next(iter(rows(8)))
    torch.testing.assert_close(module.net(x), module.model.merge()(x))


@both
def test_a_network_that_is_wrapped_when_it_is_configured(through, tmp_path):
    class Late(Module):
        def __init__(self):
            lightning.LightningModule.__init__(self)
            self.net = None

        def configure_model(self):
            if self.net is None:
                model = SubspaceModel(build("mlp"), 12)
                self.net = model if through == "handle" else model.body

    module = Late()
    trainer(tmp_path, enable_checkpointing=False).fit(module, rows(8))
    assert torch.equal(module.coordinates, plain())
