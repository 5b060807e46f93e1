"""Railway's project as code (https://docs.railway.com/infrastructure-as-code): `railway config plan`, then `… apply`.

ops/deploy/railway.md goes through it. Variables that are not named here are taken away by `apply`: add yours with `preserve()`.
"""

from railway_sdk import define_railway, github, postgres, preserve, project, redis, service

REPOSITORY = "YOUR/agentflow"
REGION = "europe-west4-drams3a"
IMAGE = {"builder": "DOCKERFILE", "dockerfilePath": "ops/Dockerfile"}
#: Railway's own draining is 0 s: SIGKILL at once. SHUTDOWN_GRACE, 25 s, ends before this does.
DEPLOY = {"restartPolicyType": "ON_FAILURE", "restartPolicyMaxRetries": 10, "drainingSeconds": 30}


@define_railway
def main(ctx=None):
    database = postgres("agentflow-postgres")
    scratchpad = redis("agentflow-redis")
    environment = {
        "AGENTFLOW_ENV": "production",
        "PORT": "8080",
        "TRUSTED_PROXIES": "1",
        "JOB_CONCURRENCY": "25",
        "DATABASE_URL": database.env["DATABASE_URL"],
        "REDIS_URL": scratchpad.env["REDIS_URL"],
        # Set once with `railway variable set`, in each service.
        "ADMIN_API_KEY": preserve(),
        "ENCRYPTION_KEY": preserve(),
        "SUPABASE_URL": preserve(),
        "SUPABASE_SECRET_KEY": preserve(),
    }

    def process(name, command, replicas, health):
        return service(
            name,
            source=github(REPOSITORY, branch="main"),
            build=IMAGE,
            start=command,
            preDeploy=["python -m migrations"],
            healthcheck=health,
            healthcheckTimeout=300,
            replicas={REGION: replicas},
            deploy=DEPLOY,
            env=environment,
        )

    return project(
        "agentflow",
        resources=[
            database,
            scratchpad,
            process("agentflow-web", "gunicorn -c web/gunicorn_config.py web.wsgi:app", 2, "/health/ready"),
            # Right with and without a shell around it; exec makes the worker the process that gets SIGTERM.
            process(
                "agentflow-worker",
                "sh -c 'exec dramatiq actors --processes 1 --threads ${JOB_CONCURRENCY:-25}'",
                2,
                "/health/live",
            ),
            process("agentflow-scheduler", "python -m scheduler", 1, "/health/live"),
        ],
    )
