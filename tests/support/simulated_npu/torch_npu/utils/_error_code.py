"""Endings of torch_npu's messages, without their codes."""


class _AnyName(type):
    def __getattr__(cls, name):
        return name


class ErrCode(metaclass=_AnyName):
    """Each of its members is its own name."""


def pta_error(code) -> str:
    return f" ({code})"
