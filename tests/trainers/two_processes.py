"""Two processes that train on halves of each batch come to the numbers of one that has all."""

import os

from tests.trainers.test_accelerate import Loop, rows


def as_launched(rank, world):
    """The environment that launchers make."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "test"}
    names |= {"GROUP_RANK": 0, "ROLE_RANK": rank, "TORCHELASTIC_RESTART_COUNT": 0}
    if world > 1:
        os.environ |= address | {name: str(value) for name, value in names.items()}


def accelerated(through):
    def run(rank, world):
        as_launched(rank, world)
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        loop = Loop(through, batch=8 // world).epoch()
        assert loop.accelerator.num_processes == world
        loop.accelerator.save_state(f"{through}{world}")
        return loop.coordinates

    return run


def trainer(through):
    def run(rank, world):
        as_launched(rank, world)
        from tests.trainers import test_trainer

        model, running = test_trainer.trainer(
            test_trainer.llama(),  # without dropout, which every process draws for itself
            through,
            f"trainer-{through}",
            test_trainer.TEXT,
            per_device_train_batch_size=4 // world,
            save_strategy="steps",
            save_steps=4,
            **{"ddp_backend": "gloo"} if world > 1 else {},
        )
        running.train()
        return test_trainer.trained(model)

    return run


def lightning(through):
    def run(rank, world):
        as_launched(rank, world)
        from tests.trainers import test_lightning

        module = test_lightning.Module(through)
        running = test_lightning.trainer(f"lightning{world}", devices=world, strategy="ddp")
        running.fit(module, rows(8 // world))
        return module.coordinates

    return run


SCENARIOS = {
    f"{run.__name__}, {through}": run(through)
    for run in (accelerated, trainer, lightning)
    for through in ("network", "handle")
}
