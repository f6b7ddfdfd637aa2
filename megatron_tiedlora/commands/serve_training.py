"""Serve training to many clients: each trains adapters of its own on one base, which stays in memory.

    tiedlora serve-training --token_file tokens --new_token ana                    a token for a client, printed once
    tiedlora serve-training --model FOLDER --state DIR --token_file tokens         one process
    torchrun --nproc_per_node 8 -m megatron_tiedlora serve-training --model FOLDER --tensor_parallel 4 ...
"""

from megatron_tiedlora.base.installation import require_extra
from megatron_tiedlora.base.messages import show, user_path
from megatron_tiedlora.config.service_settings import ServiceSettings
from megatron_tiedlora.runtime.launch_env import prepare_environment


def main(settings: ServiceSettings) -> int:
    """Run one rank of a service until a signal stops it, and return the exit status: 130, 143 or 138, or 0 if the
    command only added a token."""
    require_extra("service")
    from megatron_tiedlora.service.tokens import new_token

    if settings.new_token is not None:
        show(new_token(user_path(settings.token_file), settings.new_token))
        return 0
    require_extra("train")
    from megatron_tiedlora.runtime.ending import reported_end

    prepare_environment()
    with reported_end() as end:
        end.unsaved = "all that was accepted is in --state"
        # This imports DeepSpeed and transformers, which takes seconds.
        from megatron_tiedlora.service.serve import serve_rank

        serve_rank(settings, end.rank, end.world_size, end.stop, end)
    return end.status
