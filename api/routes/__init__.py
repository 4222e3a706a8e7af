"""The routes, a file a noun."""

from api.routes import adapters, api_keys, evaluations, files, images, jobs, models, ops

ROUTERS = [
    files.router,
    jobs.router,
    adapters.router,
    models.router,
    images.router,
    evaluations.router,
    api_keys.router,
    ops.router,
]
