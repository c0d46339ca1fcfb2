"""A request that gets no answer, and what it is told instead."""

import math


class Refusal(Exception):
    """What becomes of a request that is not answered: a status, one line, and when to come again.

    Args:
        status: of HTTP.
        line: what the client is told; nothing of the machine is in it.
        reason: what the metrics count it as; "": as nothing but its status.
        retry_after: seconds after which it may come again.
        closes: whether the connection ends with it, as the rest of its body is not read.
    """

    def __init__(
        self,
        status: int,
        line: str,
        reason: str = "",
        *,
        retry_after: float | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(line)
        self.status, self.line, self.reason, self.closes = status, line, reason, closes
        self.retry_after = None if retry_after is None else max(math.ceil(retry_after), 1)

    @property
    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            found["www-authenticate"] = 'Bearer realm="vitral"'
        return {**found, "connection": "close"} if self.closes else found


def too_late(deadline: float) -> Refusal:
    return Refusal(503, f"no answer within {deadline:g} s; come again later", "expired", retry_after=1)
