"""The page that a server gives at ``/``: it asks that server, and nobody else."""

from vitral.artifacts.golden import golden_png
from vitral.ship.page.assemble import policy, render, script

_WORDS = {
    "invitation": "Choose, drop, paste or photograph one, and this server says what it shows.",
    "promise": "Pictures are sent to this server alone, and it keeps none.",
}


def page_for_server() -> tuple[bytes, dict[str, str]]:
    """Gives the page and the headers that it must be sent with.

    It asks v1/model, v1/predict, v1/attention, v1/explain and readyz of where it came from.
    """
    scripts = [script("engine_server.js")]
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy(scripts, "connect-src 'self'; frame-ancestors 'none'; "),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return render("Vitral", _WORDS, {"engine": "server"}, golden_png(), scripts), headers
