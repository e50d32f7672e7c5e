package main

// Tests of the commands export and import of the built program, with a server running and
// without one.

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf16"

	"energy-contracts/internal/servicetest"
)

// exportedLines returns the lines of the file contractLines that have a contract, with their
// newlines.
func exportedLines(t testing.TB) []string {
	t.Helper()
	lines := slices.Collect(strings.Lines(readFile(t, contractLines)))
	return lines[1 : len(lines)-1]
}

func TestExportWritesWhatImportReads(t *testing.T) {
	slow(t)
	besideAndWithout(t, func(t *testing.T, db string, served func() string) {
		lines := exportedLines(t)
		all := readFile(t, contractLines)
		if got, want := ok(t, db, "import", absolute(t, contractLines)), "imported 4 contracts\n"; got != want {
			t.Errorf("import printed %q, want %q", got, want)
		}
		wantMode(t, db)
		for _, tt := range []struct {
			args []string
			want string
		}{
			{nil, all},
			{[]string{"-"}, all},
			{[]string{"--org", demoOrg}, export(lines[0] + lines[1] + lines[2])},
			{[]string{"--org", strings.ToUpper(demoOtherOrg)}, export(lines[3])},
			{[]string{"--user", demoUser}, export(lines[0] + lines[1] + lines[3])},
			{[]string{"--org", demoOrg, "--user", demoUser}, export(lines[0] + lines[1])},
			{[]string{"--org", demoOtherOrg, "--user", "2f6f1c52-7d0a-4c8e-b4d3-95a1e0c7f6d2"}, export("")},
			{[]string{"--org", "00000000-0000-4000-8000-000000000000"}, export("")},
		} {
			if got := ok(t, db, append([]string{"export"}, tt.args...)...); got != tt.want {
				t.Errorf("export %q printed\n%swant\n%s", tt.args, got, tt.want)
			}
		}
		refusedCommand(t, db, "--org must be a UUID of 36 characters, has 1", "export", "--org", "x")
		refusedCommand(t, db, "--user must be a UUID of 36 characters, has 1", "export", "--user", "x")

		dir := t.TempDir()
		file := filepath.Join(dir, "out.jsonl")
		for range 2 { // the second export replaces the first
			if got := ok(t, db, "export", file); got != "" || readFile(t, file) != all {
				t.Errorf("export printed %q and wrote\n%s", got, readFile(t, file))
			}
		}
		wantMode(t, file)
		wantFiles(t, dir, "out.jsonl")
		refusedCommand(t, db, db+" is a database in use, so it was not replaced; name another file, or stop the process that uses it", "export", db)

		// Importing the same file again changes nothing; a line replaces the contract with its
		// key.
		ok(t, db, "import", file)
		wantExport(t, db, all)
		changed := strings.Replace(lines[1], `"monthly"`, `"yearly"`, 1)
		if err := os.WriteFile(file, []byte(changed), 0o600); err != nil {
			t.Fatal(err)
		}
		ok(t, db, "import", file)
		wantExport(t, db, export(lines[0]+changed+lines[2]+lines[3]))

		// The API's representation is the line without its first two members.
		c := addClient(t, db)
		url := served()
		resp, got := do(t, client(url, c.ID, c.Secret), "GET", contractsURL(url, demoOrg, demoUser)+"/"+demoContract, nil, "")
		_, want, _ := strings.Cut(lines[0], `"user_id":"`+demoUser+`",`)
		if resp.StatusCode != 200 || got+"\n" != "{"+want {
			t.Errorf("%s\n%s\nwant\n{%s", resp.Status, got, want)
		}
	})
}

func TestExportOfABrokenContractFails(t *testing.T) {
	besideAndWithoutBroken(t, func(t *testing.T, db, id string) {
		file := filepath.Join(t.TempDir(), "out.jsonl")
		if err := os.WriteFile(file, []byte("an older one"), 0o600); err != nil {
			t.Fatal(err)
		}
		got := run(t, nil, "export", file, "--db", db)
		if want := "energy-contracts: "; got.status != 1 || !strings.Contains(got.stderr, want) || strings.Contains(got.stderr, "goroutine") {
			t.Errorf("%+v", got)
		}
		if readFile(t, file) != "an older one" {
			t.Errorf("the older file is now\n%s", readFile(t, file))
		}
		got = run(t, nil, "export", "-", "--db", db)
		if got.status != 1 || !strings.Contains(got.stderr, "energy-contracts: ") {
			t.Errorf("%+v", got)
		}
		refusedCommand(t, shortPath(t), cutOff+", so nothing was imported; get all of it, or use --keep-going to import what is there", "import", writeFile(t, []byte(got.stdout)))
	})
}

// The cause may be a network that fails, a disk that is full, or a process that is killed.
func TestImportOfACutOffExportIsRefused(t *testing.T) {
	const begin, end = `{"export":"begin"}` + "\n", `{"export":"end"}` + "\n"
	const refused = cutOff + ", so nothing was imported; get all of it, or use --keep-going to import what is there"
	l := exportedLines(t)
	half := l[3][:len(l[3])/2]
	invalid := func(line, of int, fault string) string {
		return fmt.Sprintf("line %d: %s\nnothing was imported: 1 invalid line out of %d; correct the input, or use --keep-going to import the valid lines", line, fault, of)
	}
	cut := invalid(5, 4, "#/id at byte 158: the JSON is cut off")
	for _, tt := range []struct {
		name, in string
		imported int    // contracts, also with --keep-going
		refused  string // "" if the input is complete
	}{
		{"whole", export(l[0] + l[1] + l[2]), 3, ""},
		{"without the last newline", strings.TrimSuffix(export(l[0]), "\n"), 1, ""},
		{"with neither the first line nor the last", l[0] + l[1], 2, ""},
		{"without the first line", l[0] + end, 1, ""},
		{"without a contract", export(""), 0, ""},
		{"two in a row", export(l[0]) + export(l[1]+l[2]), 3, ""},
		{"sorted", begin + end + l[0] + l[1], 2, ""},
		{"changed on each line", `{"export":"begin","supplier":"X"}` + "\n" + l[0] + `{"export":"end","supplier":"X"}` + "\n", 1, ""},
		{"with other spaces and line ends", "\ufeff" + `{"export": "begin"}` + "\r\n" + l[0] + ` {"export": "end"}` + "\r\n\r\n", 1, ""},
		{"cut off after the first line", begin, 0, refused},
		{"cut off after a contract", begin + l[0] + l[1], 2, refused},
		{"cut off before a newline", begin + l[0] + strings.TrimSuffix(l[1], "\n"), 2, refused},
		{"cut off in a contract", begin + l[0] + l[1] + l[2] + half, 3, cut},
		{"cut off in the last line", begin + l[0] + `{"export":"en`, 1, invalid(3, 2, "#/export at byte 13: the JSON is cut off")},
		{"two in a row, the first one cut off", begin + l[0] + export(l[1]), 2, refused},
		{"two in a row, the second one cut off", export(l[0]) + begin + l[1], 2, refused},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := writeFile(t, []byte(tt.in))
			besideAndWithout(t, func(t *testing.T, db string, _ func() string) {
				imported := fmt.Sprintf("imported %s\n", counted(tt.imported, "contract"))
				got := run(t, nil, "import", file, "--db", db)
				if tt.refused == "" {
					if got != (ran{imported, "", 0}) {
						t.Errorf("%+v, want %q", got, imported)
					}
					return
				}
				if text := strings.ReplaceAll(got.stdout+got.stderr, "energy-contracts: ", ""); got.status != 1 || text != tt.refused+"\n" {
					t.Errorf("%+v\nwant %q", got, tt.refused)
				}
				wantExport(t, db, export(""))
				got = run(t, nil, "import", "--keep-going", file, "--db", db)
				if got.status != 1 || !strings.HasSuffix(got.stdout, imported) || !strings.HasSuffix(got.stderr, cutOff+"\n") {
					t.Errorf("with --keep-going: %+v, want %q and %q", got, imported, cutOff)
				}
				if n := strings.Count(ok(t, db, "export"), "\n") - 2; n != tt.imported {
					t.Errorf("%d contracts are stored, want %d", n, tt.imported)
				}
			})
		})
	}
}

// An export that is killed leaves whole lines.
func TestImportFromAnExportThatIsKilledIsRefused(t *testing.T) {
	source, db := shortPath(t), shortPath(t)
	const lines = 5000
	ok(t, source, "import", servicetest.ManyLines(t, lines, 500))
	for _, tt := range []struct {
		args   []string
		stdout string
		stderr string
	}{
		{nil, "", "energy-contracts: " + cutOff + ", so nothing was imported; get all of it, or use --keep-going to import what is there\n"},
		{[]string{"--keep-going"}, "imported 1000 contracts\n", "energy-contracts: " + cutOff + "\n"},
	} {
		exporter := command(t, nil, "export", "-", "--db", source)
		out, err := exporter.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := exporter.Start(); err != nil {
			t.Fatal(err)
		}
		f := feed(t, db, tt.args...)
		from := bufio.NewReader(out)
		for range 1 + 1000 {
			line, err := from.ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(f, line); err != nil {
				t.Fatal(err)
			}
		}
		_ = exporter.Process.Kill() // it waits, since the pipe is full
		_ = exporter.Wait()
		f.Close()
		if err := f.cmd.Wait(); f.cmd.ProcessState.ExitCode() != 1 || f.stdout.String() != tt.stdout || f.stderr.String() != tt.stderr {
			t.Errorf("import %q: %v\n%s%s", tt.args, err, f.stdout, f.stderr)
		}
	}
}

// A server need not wait for a pipe that may never bring anything.
func TestStopDoesNotWaitForAnImport(t *testing.T) {
	db := shortPath(t)
	p := startProcess(t, nil, "--db", db)
	f := feed(t, db)
	f.lines(t, 0, 5000) // more than the buffers on the way hold
	refusedCommand(t, db, "Another import is running; try again when it has ended.", "import", writeFile(t, nil))
	began := time.Now()
	if err := p.Terminate(t); err != nil {
		t.Errorf("%v\n%s", err, p.Stderr)
	}
	if took := time.Since(began); took > shutdownTimeout/2 {
		t.Errorf("the stop took %v", took)
	}
	_ = f.cmd.Wait()
	want := "energy-contracts: the server is stopping, so nothing was imported; import again when it has started\n"
	if f.cmd.ProcessState.ExitCode() != 1 || f.stdout.String() != "" || f.stderr.String() != want {
		t.Errorf("%v\n%s%s, want %s", f.cmd.ProcessState, f.stdout, f.stderr, want)
	}
	wantExport(t, db, export(""))
}

func TestLineOfAnImportHoldsToMaxBody(t *testing.T) {
	line := func(i, size int) string {
		text := fmt.Sprintf("{%s}\n", lineIDs(i))
		return strings.Repeat(" ", size-len(text)) + text
	}
	for _, tt := range []struct {
		name  string
		serve []string // nil: no server
		max   int
	}{
		{"without a server", nil, 4<<20 + 1<<20 + 4<<10},
		{"beside a server", []string{}, 4<<20 + 1<<20 + 4<<10},
		{"beside a server that takes less", []string{"--max-body", "8192"}, 8<<10 + 2<<10 + 4<<10},
		{"beside a server that takes more", []string{"--max-body", "8388608"}, 8<<20 + 2<<20 + 4<<10},
	} {
		t.Run(tt.name, func(t *testing.T) {
			db := shortPath(t)
			if tt.serve != nil {
				startProcess(t, nil, append(tt.serve, "--db", db)...)
			}
			in := writeFile(t, []byte(line(0, tt.max)+line(1, tt.max+1)+line(2, 3*tt.max)+line(3, 500)))
			got := run(t, nil, "import", "--keep-going", in, "--db", db)
			fault := fmt.Sprintf("# must be at most %d bytes; import a longer line while a server with a larger --max-body runs\n", tt.max)
			want := ran{"line 2: " + fault + "line 3: " + fault + "imported 2 contracts\n", "energy-contracts: skipped 2 invalid lines out of 4\n", 1}
			if got != want {
				t.Errorf("%+v\nwant %+v", got, want)
			}
		})
	}
}

// A stored contract may be larger than the request that it came with, since its timestamps are
// completed. What the API takes, an import must take too.
func TestContractOfMaxBodyCanBeImported(t *testing.T) {
	const maxBody = 64 << 10
	var body strings.Builder
	body.WriteString(`{"currency_energy_price":"EUR","energy_prices":[`)
	for i := 0; ; i++ {
		price := fmt.Sprintf(`{"price":1,"timestamp":"%s+00"},`, time.Unix(int64(i)*60, 0).UTC().Format("2006-01-02 15:04"))
		if body.Len()+len(price)+len("]}") > maxBody {
			break
		}
		body.WriteString(price)
	}
	content := strings.TrimSuffix(body.String(), ",") + "]}"
	from, to := shortPath(t), shortPath(t)
	p := startProcess(t, nil, "--demo", "--db", from, "--max-body", fmt.Sprint(maxBody))
	startProcess(t, nil, "--db", to, "--max-body", fmt.Sprint(maxBody))
	if resp, got := do(t, client(p.URL, "demo", "demo-secret"), "PUT", contractsURL(p.URL, demoOrg, demoUser)+"/"+demoContract, jsonBody, content); resp.StatusCode != 200 || len(got) < maxBody*9/8 {
		t.Fatalf("%s, %d bytes of %d: %s", resp.Status, len(got), len(content), head(got))
	}
	exported := ok(t, from, "export")
	ok(t, to, "import", writeFile(t, []byte(exported)))
	wantExport(t, to, exported)
}

// badLines are invalid lines and their errors, one a line, each after "line N: " in the
// output of import. The last one is invalid since its contract is already in line 1.
var badLines = []struct{ name, line, want string }{
	{"no object", "[]", "# must be an object, is an array"},
	{"half an object", `{"org_id":`, "#/org_id at byte 10: the JSON is cut off"},
	{"two objects", `{}{}`, "# at byte 3: something follows the end of the JSON; send one JSON value"},
	{"a name twice", `{"id":null,"id":null}`, "#/id at byte 11: this member appears twice; send it once"},
	{"bytes that are not UTF-8", "{\"supplier\":\"\xff\"}", "#/supplier at byte 13: invalid UTF-8; save the text as UTF-8"},
	{"no ids", `{}`, "#/org_id is required; send a UUID such as 3c90c3cc-0d44-4b50-8888-8dd25736052a\n#/user_id is required; send a UUID such as 3c90c3cc-0d44-4b50-8888-8dd25736052a\n#/id is required; send a UUID such as 3c90c3cc-0d44-4b50-8888-8dd25736052a"},
	{"wrong ids", `{"org_id":"x","user_id":1,"id":null}`, "#/user_id must be a UUID, is a number\n#/org_id must be a UUID of 36 characters, has 1\n#/id is required; send a UUID such as 3c90c3cc-0d44-4b50-8888-8dd25736052a"},
	{"the API's name of a member", `{` + lineIDs(1) + `,"building_id":null}`, "#/building_id unknown member; known are org_id, user_id, energy_contract_type, energy_prices, id, building, meter_id, supplier, currency_energy_price, energy_price_includes_external_components"},
	{"a misspelling", `{` + lineIDs(1) + `,"user-id":null}`, "#/user-id unknown member; did you mean user_id?"},
	{"broken rules", `{` + lineIDs(1) + `,"building":"b","meter_id":"12345678901234567890","energy_contract_type":"spot_hourly","energy_prices":[{"price":1}]}`,
		"#/building must be a UUID such as 3c90c3cc-0d44-4b50-8888-8dd25736052a or null, is \"b\"\n#/meter_id must be at most 19 characters, has 20\n#/currency_energy_price is required when energy_contract_type is spot_hourly and energy_prices has an entry; send an ISO 4217 code such as EUR"},
	{"null for prices", `{` + lineIDs(1) + `,"energy_prices":null}`, "#/energy_prices must be an array, is null; leave it out or send []"},
	{"the same contract", `{` + lineIDs(0) + `}`, "#/id is the same contract as line 1"},
}

// lineIDs returns the members that a line must have, with the IDs of key(i).
func lineIDs(i int) string {
	k := key(i)
	return fmt.Sprintf(`"org_id":%q,"user_id":%q,"id":%q`, k.Org, k.User, k.Contract)
}

func TestImportReportsEachBadLine(t *testing.T) {
	besideAndWithout(t, func(t *testing.T, db string, _ func() string) {
		ok(t, db, "import", absolute(t, contractLines))
		file := filepath.Join(t.TempDir(), "in.jsonl")
		var in, report strings.Builder
		fmt.Fprintf(&in, "{%s}\n", lineIDs(0))
		for i, bad := range badLines {
			in.WriteString(bad.line + "\n")
			for fault := range strings.SplitSeq(bad.want, "\n") {
				fmt.Fprintf(&report, "line %d: %s\n", i+2, fault)
			}
		}
		fmt.Fprintf(&in, "  {%s}\r\n{%s}", lineIDs(2), lineIDs(3)) // the last line has no newline
		if err := os.WriteFile(file, []byte(in.String()), 0o600); err != nil {
			t.Fatal(err)
		}
		n, of := len(badLines), len(badLines)+3
		stdout := refusedCommand(t, db, fmt.Sprintf("nothing was imported: %d invalid lines out of %d; correct the input, or use --keep-going to import the valid lines", n, of), "import", file)
		if stdout != report.String() {
			t.Errorf("import printed\n%swant\n%s", stdout, &report)
		}
		wantExport(t, db, readFile(t, contractLines))
		stdout = refusedCommand(t, db, fmt.Sprintf("skipped %d invalid lines out of %d", n, of), "import", "--keep-going", file)
		if want := report.String() + "imported 3 contracts\n"; stdout != want {
			t.Errorf("import printed\n%swant\n%s", stdout, want)
		}
		if got := ok(t, db, "export"); strings.Count(got, "\n") != 2+7 {
			t.Errorf("want 7 contracts, export printed\n%s", got)
		}
		if got := ok(t, db, "check"); !strings.Contains(got, " is sound: 7 contracts") {
			t.Error(got)
		}
	})
}

func TestImportOfAnEmptyFile(t *testing.T) {
	besideAndWithout(t, func(t *testing.T, db string, _ func() string) {
		file := filepath.Join(t.TempDir(), "in.jsonl")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if got := ok(t, db, "import", file); got != "imported 0 contracts\n" {
			t.Errorf("import printed %q", got)
		}
		refusedCommand(t, db, "open "+file+"x: no such file or directory; name a file that this account may read, or - for standard input", "import", file+"x")
		wantExport(t, db, export(""))
	})
}

func TestImportSkipsEmptyLines(t *testing.T) {
	besideAndWithout(t, func(t *testing.T, db string, _ func() string) {
		lines := exportedLines(t)
		in := "\r\n" + lines[0] + "\n \t\n" + lines[1] + lines[2] + lines[3] + "\n\r\n  "
		if got, want := ok(t, db, "import", writeFile(t, []byte(in))), "imported 4 contracts\n"; got != want {
			t.Errorf("import printed %q, want %q", got, want)
		}
		wantExport(t, db, readFile(t, contractLines))
		stdout := refusedCommand(t, db, "nothing was imported: 1 invalid line out of 2; correct the input, or use --keep-going to import the valid lines",
			"import", writeFile(t, []byte("\n\n"+lines[0]+"\n[]\n\n")))
		if want := "line 5: # must be an object, is an array\n"; stdout != want {
			t.Errorf("import printed %q, want %q", stdout, want)
		}
	})
}

func TestImportOfUTF16IsRefusedWithOneSentence(t *testing.T) {
	long := strings.Repeat(readFile(t, contractLines), 5000) // more than the buffers between the command and the server
	besideAndWithout(t, func(t *testing.T, db string, _ func() string) {
		for name, tt := range map[string]struct {
			bom   string
			order binary.AppendByteOrder
		}{
			"little-endian with a mark":    {"\ufeff", binary.LittleEndian},
			"big-endian with a mark":       {"\ufeff", binary.BigEndian},
			"little-endian without a mark": {"", binary.LittleEndian},
			"big-endian without a mark":    {"", binary.BigEndian},
		} {
			for _, text := range []string{"\n", readFile(t, contractLines), long} {
				var in []byte
				for _, unit := range utf16.Encode([]rune(tt.bom + text)) {
					in = tt.order.AppendUint16(in, unit)
				}
				stdout := refusedCommand(t, db, "the input is in UTF-16, so nothing was imported; save it as UTF-8 and import it again", "import", writeFile(t, in))
				if stdout != "" {
					t.Errorf("%s: import printed %q", name, head(stdout))
				}
			}
		}
		wantExport(t, db, export(""))
	})
}

func TestImportOfAnotherFormatIsRefusedWithOneSentence(t *testing.T) {
	var compressed bytes.Buffer
	w := gzip.NewWriter(&compressed)
	if _, err := w.Write([]byte(readFile(t, contractLines))); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	array := "[" + strings.Join(strings.Split(strings.TrimSpace(readFile(t, contractLines)), "\n"), ",\n") + "]\n"
	besideAndWithout(t, func(t *testing.T, db string, _ func() string) {
		for in, want := range map[string]string{
			compressed.String(): "the input is compressed with gzip, so nothing was imported; decompress it and import it again",
			array:               "the input is a JSON array, so nothing was imported; write each contract on a line of its own and import it again",
		} {
			if stdout := refusedCommand(t, db, want, "import", writeFile(t, []byte(in))); stdout != "" {
				t.Errorf("import printed %q", head(stdout))
			}
		}
		wantExport(t, db, export(""))
	})
}

// feeding is a running import that reads from a pipe, to which the test writes lines.
type feeding struct {
	io.WriteCloser
	cmd    *exec.Cmd
	stdout *lockedBuffer
	stderr *lockedBuffer
}

// feed starts an import from a pipe. The test must close the pipe to end the import.
func feed(t testing.TB, db string, args ...string) *feeding {
	t.Helper()
	f := &feeding{cmd: command(t, nil, append([]string{"import", "--db", db, "-"}, args...)...), stdout: &lockedBuffer{}, stderr: &lockedBuffer{}}
	f.cmd.Stdout, f.cmd.Stderr = f.stdout, f.stderr
	var err error
	if f.WriteCloser, err = f.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := f.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.cmd.Process.Kill(); _ = f.cmd.Wait() })
	return f
}

// lines writes the lines of the contracts key(from) to key(to-1).
func (f *feeding) lines(t testing.TB, from, to int) {
	t.Helper()
	var b strings.Builder
	for i := from; i < to; i++ {
		fmt.Fprintf(&b, "{%s}\n", lineIDs(i))
	}
	if _, err := io.WriteString(f, b.String()); err != nil {
		t.Fatalf("%v\n%s", err, f.stderr)
	}
}

func TestImportIsVisibleOnceCommitted(t *testing.T) {
	db := shortPath(t)
	p := startProcess(t, nil, "--demo", "--db", db)
	before := ok(t, db, "export")
	f := feed(t, db)
	f.lines(t, 0, 5000)
	t.Run("one at a time", func(t *testing.T) {
		waitFor(t, "a second import is refused", func() bool {
			got := run(t, nil, "import", absolute(t, contractLines), "--db", db)
			return got.status == 1 && got.stderr == "energy-contracts: Another import is running; try again when it has ended.\n"
		})
	})
	wantExport(t, db, before)
	// Requests are served during the import.
	c := client(p.URL, "demo", "demo-secret")
	url := contractsURL(p.URL, demoOrg, demoUser)
	if resp, got := do(t, c, "PUT", url+"/"+demoContract, jsonBody, `{"supplier":"meanwhile"}`); resp.StatusCode != 200 {
		t.Errorf("%s\n%s", resp.Status, got)
	}
	f.lines(t, 5000, 6000)
	f.Close()
	if err := f.cmd.Wait(); err != nil || f.stdout.String() != "imported 6000 contracts\n" || f.stderr.String() != "" {
		t.Errorf("%v, %s%s", err, f.stdout, f.stderr)
	}
	after := ok(t, db, "export")
	if n := strings.Count(after, "\n") - strings.Count(before, "\n"); n != 6000 || !strings.Contains(after, `"supplier":"meanwhile"`) {
		t.Errorf("%d contracts more, want 6000 and the PUT during the import", n)
	}
}

func TestInterruptedImportLeavesNothing(t *testing.T) {
	slow(t)
	interruptions := map[string]func(t *testing.T, f *feeding, p *process){
		"the command is killed": func(t *testing.T, f *feeding, _ *process) { _ = f.cmd.Process.Kill(); _ = f.cmd.Wait() },
		"the command is interrupted": func(t *testing.T, f *feeding, _ *process) {
			_ = f.cmd.Process.Signal(os.Interrupt)
			err := f.cmd.Wait() // although its input goes on
			if want := "energy-contracts: the import was interrupted; repeat it to be sure of its result\n"; f.cmd.ProcessState.ExitCode() != 1 || f.stderr.String() != want {
				t.Errorf("%v\n%s%s", err, f.stdout, f.stderr)
			}
			f.Close()
		},
		"the server is killed": func(t *testing.T, f *feeding, p *process) {
			p.Kill(t)
			f.Close()
			if err := f.cmd.Wait(); err == nil || !strings.Contains(f.stderr.String(), "energy-contracts: ") {
				t.Errorf("the import succeeded\n%s%s", f.stdout, f.stderr)
			}
		},
	}
	for name, interrupt := range interruptions {
		for _, up := range []bool{true, false} {
			if !up && strings.HasPrefix(name, "the server") {
				continue
			}
			t.Run(fmt.Sprintf("%s, server %v", name, up), func(t *testing.T) {
				t.Parallel()
				db := shortPath(t)
				ok(t, db, "import", absolute(t, contractLines))
				committed := func() uint64 {
					metas, err := readMetas(open(t, db))
					if err != nil {
						t.Fatal(err)
					}
					return currentMeta(metas).txid
				}
				before := committed()
				var p *process
				if up {
					p = startProcess(t, nil, "--db", db)
				}
				f := feed(t, db)
				f.lines(t, 0, 20000)
				waitFor(t, "the first lines are staged", func() bool { return committed() > before+3 })
				interrupt(t, f, p)
				waitFor(t, "the next import succeeds", func() bool {
					got := run(t, nil, "import", absolute(t, contractLines), "--db", db)
					return got.status == 0
				})
				wantExport(t, db, readFile(t, contractLines))
				if got := ok(t, db, "check"); !strings.Contains(got, " is sound: 4 contracts") {
					t.Error(got)
				}
			})
		}
	}
}

// A committed import survives a crash; one that is not committed leaves nothing.
func TestImportIsAllOrNothingWhenTheServerIsKilled(t *testing.T) {
	slow(t)
	t.Parallel()
	file := servicetest.ManyLines(t, 4000, 500)
	var none, all int
	for round := range 12 {
		db := shortPath(t)
		p := startProcess(t, nil, "--db", db)
		cmd := command(t, nil, "import", "--db", db, file)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Over the rounds, the kill hits different moments of the import.
		time.Sleep(time.Duration(round*15) * time.Millisecond)
		p.Kill(t)
		_ = cmd.Wait()
		got := ok(t, db, "export")
		switch {
		case got == export(""):
			none++
		case got == readFile(t, file):
			all++
		default:
			t.Fatalf("round %d: %d of 4000 contracts are there", round, strings.Count(got, "\n"))
		}
		if got := ok(t, db, "check"); !strings.Contains(got, " is sound: ") {
			t.Error(got)
		}
	}
	t.Logf("imported nothing %d times, everything %d times", none, all)
}

// The test above hits moments by chance. This one covers each: a committed import of which
// a given number of pieces was moved before the process ended.
func TestCommittedImportIsFinishedByTheNextStart(t *testing.T) {
	const n = 5 * importContracts
	for pieces := range 6 {
		path := newPath(t)
		s, err := Open(path, time.Now, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		staged, err := s.StartImport()
		if err != nil {
			t.Fatal(err)
		}
		for from := 0; from < n; from += importContracts {
			var lines []ImportLine
			for i := from; i < from+importContracts; i++ {
				lines = append(lines, ImportLine{Key: key(i), Document: []byte(someDocument(i)), Line: int64(i + 1)})
			}
			if _, err := staged.Stage(lines); err != nil {
				t.Fatal(err)
			}
		}
		if err := staged.Commit(); err != nil {
			t.Fatal(err)
		}
		for range pieces {
			if _, _, err := staged.Move(); err != nil {
				t.Fatal(err)
			}
		}
		if pieces > 0 && pieces < 5 { // a newer write of a client, which must not be lost
			if _, err := s.Put(key(0), []byte(`{"newer":1}`), always); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		again, _ := openStore(t, path)
		for i := range n {
			want := someDocument(i)
			if i == 0 && pieces > 0 && pieces < 5 {
				want = `{"newer":1}`
			}
			if got, _, err := again.Get(nil, key(i), always); err != nil || string(got) != want {
				t.Fatalf("after %d pieces, contract %d: %s, %v; want %s", pieces, i, got, err, want)
			}
		}
		if second, err := again.StartImport(); err != nil {
			t.Error(err)
		} else {
			second.Close()
		}
	}
}

func TestImportThroughTheSocketIsLoggedInOneLine(t *testing.T) {
	db := shortPath(t)
	p := startProcess(t, nil, "--db", db)
	ok(t, db, "import", absolute(t, contractLines))
	ok(t, db, "export")
	var seen []string
	for line := range strings.Lines(p.Stderr.String()) {
		var entry struct{ Msg, Method, Route string }
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Fatalf("%v\n%s", err, line)
		}
		if entry.Msg == "request" {
			seen = append(seen, entry.Method+" "+entry.Route)
		}
		if strings.Contains(line, "Nordlys") {
			t.Errorf("the log contains a contract: %s", line)
		}
	}
	if got := strings.Join(seen, ", "); got != "POST /contracts, GET /contracts" {
		t.Errorf("the log has %s", got)
	}
}

func TestLineReaderReturnsEachLine(t *testing.T) {
	long := bytes.Repeat([]byte("x"), 200<<10)
	in := "a\n\n" + string(long) + "\nlast"
	l := lineReader{r: bufio.NewReaderSize(strings.NewReader(in), 16), max: len(long) + 1}
	for i, want := range []string{"a", "", string(long), "last"} {
		if got, err := l.next(); err != nil || string(got) != want {
			t.Errorf("line %d: %q, %v", i, head(string(got)), err)
		}
	}
	if got, err := l.next(); !errors.Is(err, io.EOF) || l.read != int64(len(in)) {
		t.Errorf("%q, %v, %d bytes; want the end, after %d", got, err, l.read, len(in))
	}
}

// FuzzLine compares Line with Contract: a line is a contract with the three IDs, in which
// one member (building) has another name than in the API. An accepted line must be exported
// as a line whose import gives the same contract.
func FuzzLine(f *testing.F) {
	for _, line := range exportedLines(f) {
		f.Add([]byte(line))
	}
	for _, bad := range badLines {
		f.Add([]byte(bad.line))
	}
	v := fuzzValidator(f)
	f.Fuzz(func(t *testing.T, line []byte) {
		k, c, err := v.Line(line)
		value, isJSON := readJSON(line, contractLevels)
		wantRefused(t, isJSON, err)
		if !isJSON {
			return
		}
		members, good := value.(map[string]any)
		for name, is := range map[string]ID{"org_id": k.Org, "user_id": k.User, "id": k.Contract} {
			id, _ := members[name].(string)
			good = good && uuidForm.MatchString(id) && (err != nil || string(is) == strings.ToLower(id))
			delete(members, name)
		}
		if _, ok := members["building_id"]; ok {
			good = false
		}
		if building, ok := members["building"]; ok {
			members["building_id"] = building
			delete(members, "building")
		}
		want, wantErr := v.Contract(text(t, members))
		if (err == nil) != (good && wantErr == nil) {
			t.Fatalf("Line: %v; but valid ids and names: %v, and Contract without the ids: %v", err, good, wantErr)
		}
		if err != nil {
			return
		}
		doc, err := c.encode(k.Contract)
		if wanted, wantErr := want.encode(k.Contract); err != nil || wantErr != nil || string(doc) != string(wanted) {
			t.Fatalf("Line gives\n%s, %v\nContract without the ids\n%s, %v", doc, err, wanted, wantErr)
		}
		written := appendLine(nil, k, doc)
		if bytes.IndexByte(written, '\n') != len(written)-1 {
			t.Fatalf("the exported line does not have one newline, at its end: %q", written)
		}
		k2, c, err := v.Line(written)
		if err != nil || k2 != k {
			t.Fatalf("%v is exported as\n%s\nand imported as %v, %v", k, written, k2, err)
		}
		if again, err := c.encode(k.Contract); err != nil || string(again) != string(doc) {
			t.Fatalf("is exported as\n%s\nand imported as\n%s, %v", written, again, err)
		}
	})
}

// FuzzLineReader checks that lineReader returns the text between newlines.
func FuzzLineReader(f *testing.F) {
	f.Add([]byte("a\n\n" + strings.Repeat("x", 40) + "\nlast"))
	f.Fuzz(func(t *testing.T, in []byte) {
		want := bytes.Split(in, []byte("\n"))
		if last := len(want) - 1; len(want[last]) == 0 { // nothing follows the last newline
			want = want[:last]
		}
		l := lineReader{r: bufio.NewReaderSize(bytes.NewReader(in), 16), max: len(in)}
		for i, line := range want {
			if got, err := l.next(); err != nil || !bytes.Equal(got, line) {
				t.Fatalf("line %d is %q, %v, want %q", i+1, got, err, line)
			}
		}
		if got, err := l.next(); !errors.Is(err, io.EOF) || l.read != int64(len(in)) {
			t.Fatalf("%q, %v after %d bytes, want the end after %d", got, err, l.read, len(in))
		}
	})
}
