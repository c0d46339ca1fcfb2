"""The routes of a server: one table, from which both its addresses and its OpenAPI description are made."""

from dataclasses import dataclass, field
from typing import Any

from vitral.runtime.version import vitral_version
from vitral.ship.serve.guard import OPEN_ROUTES
from vitral.ship.serve.served import Served

Schema = dict[str, Any]
_TEXT, _NUMBER, _COUNT, _BOOL, _ANY = (
    {"type": kind} for kind in ("string", "number", "integer", "boolean", "object")
)


@dataclass(frozen=True)
class Route:
    """One address, and what is said of it."""

    method: str
    path: str
    name: str  # of its handler
    summary: str
    result: Schema | str  # a schema of JSON, or another media type
    body: dict[str, Schema] = field(default_factory=dict)  # by media type
    query: dict[str, tuple[Schema, str]] = field(default_factory=dict)
    refusals: tuple[int, ...] = ()  # beside those that every route has


def _object(**properties: Schema) -> Schema:
    """An object that has all of these."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_TOP = _list(_object(label=_TEXT, probability=_NUMBER))
_PREDICTION = _object(label=_or_null(_TEXT), abstained=_BOOL, top=_TOP, error=_or_null(_TEXT))
_PREDICTIONS = _object(predictions=_list(_PREDICTION), model=_object(name=_TEXT, engine=_TEXT))
_ONE = {"image/*": {}, "application/octet-stream": {}}
_IMAGES = _object(images={**_list({"type": "string", "contentEncoding": "base64"}), "minItems": 1})
_ONE_OR_MORE = {**_ONE, "application/json": _IMAGES}
_TENSOR = _object(name=_TEXT, datatype=_TEXT, shape=_list(_COUNT), data=_list({}))
_METADATA = _list(_object(name=_TEXT, datatype=_TEXT, shape=_list(_COUNT)))
_ASKED = {
    **_object(inputs=_list(_TENSOR)),
    "properties": {"id": _TEXT, "inputs": _list(_TENSOR), "outputs": _list(_object(name=_TEXT))},
}
_ANSWERED = _object(model_name=_TEXT, model_version=_TEXT, outputs=_list(_TENSOR))
_SERVER = _object(name=_TEXT, version=_TEXT)
_V2_MODEL = _object(name=_TEXT, versions=_list(_TEXT), platform=_TEXT, inputs=_METADATA, outputs=_METADATA)
_READY = _object(ready=_BOOL)
_MODEL = _object(
    name=_TEXT,
    labels=_list(_TEXT),
    img_size=_list(_COUNT),
    multi_label=_BOOL,
    abstain_below=_or_null(_NUMBER),
    engine=_TEXT,
    preprocess=_ANY,
    explains=_BOOL,
)
_MAP = _object(grid=_list(_COUNT), values=_list(_NUMBER), target=_TEXT, method=_TEXT, picture=_TEXT)
_ATTENTION = _object(
    layers=_COUNT, heads=_COUNT, grid=_list(_COUNT), prefix_tokens=_COUNT, weights=_TEXT, maxima=_TEXT
)
_ASKING = (400, 408, 413, 415, 422, 429, 503)
_V2 = "/v2/models/{model}"

ROUTES: tuple[Route, ...] = (
    Route("GET", "/", "page", "A page to try the model with", "text/html"),
    Route(
        "POST",
        "/v1/predict",
        "predict",
        "The likeliest labels of one picture, or of several",
        _PREDICTIONS,
        _ONE_OR_MORE,
        {"top": ({**_COUNT, "minimum": 1, "maximum": 1000, "default": 5}, "How many labels")},
        _ASKING,
    ),
    Route("GET", "/v1/model", "model", "What is served", _MODEL),
    Route(
        "POST",
        "/v1/explain",
        "explain",
        "How much each patch of a picture counts for a class",
        _MAP,
        _ONE_OR_MORE,
        {
            "class": (_TEXT, "A label; without it the likeliest"),
            "against": (_TEXT, "Another label: why the one and not this"),
            "method": (_TEXT, "A method of `vitral explain` that takes a few passes"),
        },
        (*_ASKING, 501),
    ),
    Route(
        "POST",
        "/v1/attention",
        "attention",
        "Which token looks where, in all layers and heads: rows in 8 bits (layers, heads, T, T) and their "
        "maxima in float32 (layers, heads, T), both base64",
        _ATTENTION,
        _ONE_OR_MORE,
        {"layer": ({**_COUNT, "minimum": 0}, "One layer alone, from 0")},
        (*_ASKING, 501),
    ),
    Route("GET", "/healthz", "health", "Whether the process lives", _object(live=_BOOL)),
    Route("GET", "/readyz", "ready", "Whether it takes requests", _READY, refusals=(503,)),
    Route("GET", "/metrics", "metrics", "Metrics for Prometheus", "text/plain"),
    Route("GET", "/openapi.json", "openapi", "This description", _ANY),
    Route("GET", "/v2", "v2_server", "Open Inference Protocol: the server", _SERVER),
    Route("GET", "/v2/health/live", "v2_live", "Open Inference Protocol: alive", _object(live=_BOOL)),
    Route("GET", "/v2/health/ready", "v2_ready", "Open Inference Protocol: ready", _READY, refusals=(400,)),
    *(
        route
        for path in (_V2, f"{_V2}/versions/{{version}}")
        for route in (
            Route(
                "GET",
                path,
                "v2_model",
                "Open Inference Protocol: the model's inputs and outputs",
                _V2_MODEL,
                refusals=(404,),
            ),
            Route(
                "GET",
                f"{path}/ready",
                "v2_model_ready",
                "Open Inference Protocol: whether the model is ready",
                _object(name=_TEXT, ready=_BOOL),
                refusals=(400, 404),
            ),
            Route(
                "POST",
                f"{path}/infer",
                "v2_infer",
                "Open Inference Protocol: answers for pictures, image BYTES [N] in base64, or pixels UINT8 "
                "[N, H, W, 3]",
                _ANSWERED,
                {"application/json": _ASKED},
                refusals=(*_ASKING, 404),
            ),
        )
    ),
)  # fmt: skip

_MEANINGS = {
    400: "The request is malformed, or for /v2: not ready",
    401: "A token is asked for",
    403: "It comes from another site's page",
    404: "There is no such model or version",
    408: "The body came too slowly",
    413: "The body, the picture or the list is too large",
    415: "No picture and no JSON",
    421: "The Host is not this server's",
    422: "The picture cannot be read, or a value is out of its range",
    429: "Too many requests of this client wait",
    501: "The engine cannot show its inside",
    503: "Too many wait, or the server is starting or ending; see Retry-After",
}


def openapi(served: Served, *, with_token: bool) -> dict[str, Any]:
    """The description of the routes, OpenAPI 3.1."""
    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, with_token=with_token)
    schemas: dict[str, Any] = {"Error": _object(error=_TEXT)}
    components: dict[str, Any] = {"schemas": schemas}
    if with_token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"vitral serve: {served.name}",
            "version": vitral_version(),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": components,
    }


def _operation(route: Route, *, with_token: bool) -> dict[str, Any]:
    asks = with_token and route.path not in OPEN_ROUTES
    always = (401, 403, 421) if asks else (403, 421)
    media = (
        {route.result: {}}
        if isinstance(route.result, str)
        else {"application/json": {"schema": route.result}}
    )
    responses: dict[str, Any] = {"200": {"description": route.summary, "content": media}}
    for code in sorted({*always, *route.refusals}):
        refusal = {"schema": {"$ref": "#/components/schemas/Error"}}
        responses[str(code)] = {"description": _MEANINGS[code], "content": {"application/json": refusal}}
    found: dict[str, Any] = {
        "operationId": _identity(route),
        "summary": route.summary,
        "responses": responses,
    }
    if parameters := [*_in_path(route.path), *_in_query(route)]:
        found["parameters"] = parameters
    if route.body:
        content = {
            media_type: {"schema": schema} if schema else {} for media_type, schema in route.body.items()
        }
        found["requestBody"] = {"required": True, "content": content}
    if asks:
        found["security"] = [{"token": []}]
    return found


def _identity(route: Route) -> str:
    return f"{route.name}_version" if "{version}" in route.path else route.name


def _in_path(path: str) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    return [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in names]


def _in_query(route: Route) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "query", "required": False, "schema": schema, "description": about}
        for name, (schema, about) in route.query.items()
    ]
