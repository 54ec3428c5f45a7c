"""The same job on Kubernetes, through DLRover: manifests, and a client for them. Runs without torch.

spec.py      what a person decides about a job
manifest.py  JobSpec -> plain dicts, by pure functions
render.py    plain dicts -> YAML with notes
client.py    the API server (the only user of the `kubernetes` package)
pods.py      a pod of a job, in words
status.py    what the API server told -> what became of a job, in words
words.py     times, numbers and messages as a person reads them
progress.py  how far training is, from the line that it writes for machines
operator.py  whether DLRover's operator runs
causes.py    why a job has no master
polling.py   looking at a job, once or again and again
actions.py   submit, scale, suspend, resume, wait, delete
trainjobs.py the same of a job that runs as Kubeflow's TrainJobs (trainjob.py)
prompt.py    talking to its model (terminal.py: without kubectl)
watch.py     the live table
logs.py      what its pods write
doctor.py    what a cluster lacks
commands.py  the command line
"""
