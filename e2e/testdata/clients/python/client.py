"""Manages a contract with requests-oauthlib. The argument is the service.

The timestamps are in the forms in which Python and its strftime print them.
"""

import os
import sys
from datetime import datetime, timedelta, timezone
from urllib.parse import urljoin

from oauthlib.oauth2 import BackendApplicationClient
from requests.auth import HTTPBasicAuth
from requests_oauthlib import OAuth2Session

service = sys.argv[1]
contracts = (
    service + "/api/partners/v2.0/org/5f0c2b9e-6f7a-4f0e-9b1d-2a4c8e6d0f11"
    "/users/016b78a7-0c7c-4241-a277-015c3ad3cb90/energy-contracts"
)
os.environ["OAUTHLIB_INSECURE_TRANSPORT"] = "1"  # the service listens without TLS


def session(**how):
    s = OAuth2Session(client=BackendApplicationClient(client_id="demo"))
    s.fetch_token(token_url=service + "/oauth2/token/", **how)
    return s


# By default the library sends the client's id in the body, too.
session(client_id="demo", client_secret="demo-secret")
session(auth=HTTPBasicAuth("demo", "demo-secret"), include_client_id=True)
session(client_id="demo", client_secret="demo-secret", include_client_id=True)
session(auth=HTTPBasicAuth("demo", "demo-secret"), client_secret="demo-secret", include_client_id=True)
session(auth=HTTPBasicAuth("demo", "demo-secret"), resource=["https://a.example", "https://b.example"])
s = session(auth=HTTPBasicAuth("demo", "demo-secret"))

start = datetime(2026, 11, 23, 17, tzinfo=timezone(timedelta(hours=1)))
hours = [start + timedelta(hours=n, microseconds=n) for n in range(4)]
timestamps = [
    str(hours[0]),
    hours[1].isoformat(sep=" "),
    hours[2].strftime("%Y-%m-%dT%H:%M:%S%z"),
    hours[3].astimezone(timezone.utc).isoformat(timespec="minutes"),
]
instants = [hours[0], hours[1], hours[2].replace(microsecond=0), hours[3].replace(microsecond=0)]
body = {
    "energy_contract_type": "spot_hourly",
    "currency_energy_price": "EUR",
    "energy_prices": [{"price": 0.25, "timestamp": t} for t in timestamps],
}
created = s.post(contracts, json=body)
assert created.status_code == 200, created.text
contract = created.json()
answered = [datetime.fromisoformat(p["timestamp"]) for p in contract["energy_prices"]]
assert answered == instants, created.text

url = urljoin(created.request.url, created.headers["Location"])
assert s.get(url).json() == contract
deleted = s.delete(url, headers={"If-Match": created.headers["ETag"]})
assert deleted.status_code == 204, deleted.text

print("ok")
