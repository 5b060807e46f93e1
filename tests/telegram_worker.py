"""`dramatiq tests.telegram_worker`: a worker whose renders are those of `tests.telegram_jobs`."""

import actors  # noqa: F401 - declares the product's types, of which one is replaced
from tests import telegram_jobs

telegram_jobs.install()

from tests import job_types  # noqa: E402, F401 - makes an actor of each type
