"""The strategies that shard optimizer state, gradients or parameters: ZeRO and FSDP."""
