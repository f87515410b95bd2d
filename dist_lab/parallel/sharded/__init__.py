"""The strategies that keep a part of every parameter: ZeRO and FSDP."""
