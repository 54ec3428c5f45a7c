"""The same job on Kubernetes, through DLRover: manifests, and a client for them. Runs without torch.

spec.py      what a person decides about a job
manifest.py  JobSpec -> plain dicts, by pure functions
render.py    plain dicts -> YAML with notes
client.py    the API server (the only user of the `kubernetes` package)
pods.py      a pod of a job, in words
status.py    the state of a job, from what the API server says
words.py     times, numbers and messages as a person reads them
progress.py  how far training is, from a line in the logs
operator.py  whether DLRover's operator runs
causes.py    why a job has no master
polling.py   reading a job, once or repeatedly
actions.py   submit, scale, suspend, resume, wait, delete
trainjob_actions.py  the same actions on Kubeflow's TrainJobs (trainjob.py)
prompt.py    talking to a job's model (terminal.py: without kubectl)
watch.py     the live table
logs.py      the logs of its pods
doctor.py    what a cluster lacks
commands.py  the command line
"""
