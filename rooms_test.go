package main

// The order of the production files, which the compiler cannot hold inside one package.

import (
	"go/ast"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/tools/go/packages"
)

// rooms are the production files from top to bottom: a file uses declarations of files
// below it only, without exception. CONTRIBUTING.md says what each one owns.
var rooms = []string{
	"main.go",
	"cmd_serve.go",
	"cmd_client.go",
	"cmd_backup.go",
	"cmd_restore.go",
	"cmd_check.go",
	"cmd_compact.go",
	"cmd_export.go",
	"cmd_import.go",
	"cmd_version.go",
	"control_client.go",
	"cmd_app.go",
	"control_server.go",
	"control_clients.go",
	"control_backup.go",
	"control_export.go",
	"control_import.go",
	"control.go",
	"control_peer_linux.go",
	"control_peer_bsd.go",
	"control_peer_other.go",
	"demo.go",
	"certificate.go",
	"log.go",
	"handler.go",
	"docs.go",
	"auth.go",
	"oauth.go",
	"api.go",
	"issuer.go",
	"issuer_keys.go",
	"throttle.go",
	"cors.go",
	"idempotency.go",
	"router.go",
	"exchange.go",
	"problem.go",
	"memory.go",
	"conditions.go",
	"validate.go",
	"parse.go",
	"parse_price.go",
	"store_open.go",
	"store_check.go",
	"store_copy.go",
	"store_import.go",
	"store_contracts.go",
	"store_tokens.go",
	"store_clients.go",
	"store_health.go",
	"store_commit.go",
	"store_expiry.go",
	"store_quotas.go",
	"store_read.go",
	"store_values.go",
	"store_file.go",
	"store.go",
	"store_token_cache.go",
	"metrics.go",
	"bolt_check.go",
	"bolt_account.go",
	"bolt_pages.go",
	"bolt_file.go",
	"atomicfile.go",
	"fault.go",
	"model.go",
	"version.go",
}

// libraries are the imports that belong to certain files, by the patterns of their names.
var libraries = map[string][]string{
	"go.etcd.io/bbolt":                        {"store*.go"},
	"github.com/VictoriaMetrics/metrics":      {"metrics.go", "store_health.go"},
	"github.com/schollz/progressbar/v3":       {"cmd_app.go"},
	"github.com/coreos/go-systemd/v22/daemon": {"cmd_serve.go"},
	"github.com/go-playground/validator/v10":  {"validate.go"},
	"github.com/julienschmidt/httprouter":     {"router.go"},
	"github.com/rs/cors":                      {"cors.go"},
	"github.com/swaggest/swgui/v5/static":     {"docs.go"},
	"github.com/alecthomas/kong":              {"main.go"},
	"github.com/golang-jwt/jwt/v5":            {"issuer.go"},
}

// withoutHTTP are the files that know nothing of HTTP.
var withoutHTTP = []string{"validate.go", "parse*.go", "store*.go", "bolt*.go", "atomicfile.go", "model.go", "fault.go", "version.go"}

// loadProduction loads the package without its tests, once.
var loadProduction = sync.OnceValues(func() (*packages.Package, error) {
	loaded, err := packages.Load(&packages.Config{
		Mode: packages.NeedName | packages.NeedFiles | packages.NeedImports | packages.NeedSyntax | packages.NeedTypes | packages.NeedTypesInfo,
	}, ".")
	if err != nil {
		return nil, err
	}
	for _, err := range loaded[0].Errors {
		return nil, err
	}
	return loaded[0], nil
})

// production returns the package as the compiler sees it, without its tests.
func production(t *testing.T) *packages.Package {
	t.Helper()
	p, err := loadProduction()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestEachFileUsesOnlyFilesBelowIt(t *testing.T) {
	p := production(t)
	var files []string
	for _, f := range p.Syntax {
		user := filepath.Base(p.Fset.Position(f.Pos()).Filename)
		files = append(files, user)
		ast.Inspect(f, func(n ast.Node) bool {
			name, ok := n.(*ast.Ident)
			if !ok {
				return true
			}
			used := p.TypesInfo.Uses[name]
			if used == nil || used.Pkg() != p.Types {
				return true
			}
			owner := filepath.Base(p.Fset.Position(used.Pos()).Filename)
			if slices.Index(rooms, owner) < slices.Index(rooms, user) {
				t.Errorf("%s uses %s of %s, which stands above it", p.Fset.Position(name.Pos()), name.Name, owner)
			}
			return true
		})
	}
	for _, f := range p.IgnoredFiles { // those of other systems, of which only the names are known
		if name := filepath.Base(f); !strings.HasSuffix(name, "_test.go") {
			files = append(files, name)
		}
	}
	for _, f := range files {
		if !slices.Contains(rooms, f) {
			t.Errorf("%s is not in the list of rooms", f)
		}
	}
	for _, f := range rooms {
		if !slices.Contains(files, f) {
			t.Errorf("%s is in the list of rooms and not among the files", f)
		}
	}
}

func TestEachLibraryHasItsRoom(t *testing.T) {
	matches := func(patterns []string, name string) bool {
		return slices.ContainsFunc(patterns, func(pattern string) bool {
			ok, err := path.Match(pattern, name)
			return ok && err == nil
		})
	}
	p, imported := production(t), map[string]bool{}
	for _, f := range p.Syntax {
		name := filepath.Base(p.Fset.Position(f.Pos()).Filename)
		for _, i := range f.Imports {
			library, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			imported[library] = true
			if allowed, ok := libraries[library]; ok && !matches(allowed, name) {
				t.Errorf("%s imports %s, which is for %v", name, library, allowed)
			}
			if library == "net/http" && matches(withoutHTTP, name) {
				t.Errorf("%s imports net/http", name)
			}
		}
	}
	for library := range libraries {
		if !imported[library] {
			t.Errorf("no file imports %s; take it off the list", library)
		}
	}
}

func TestCONTRIBUTINGHasTheRoomsInOrder(t *testing.T) {
	var listed []string
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z_]+\\.go)` \\|").FindAllStringSubmatch(readFile(t, "CONTRIBUTING.md"), -1) {
		listed = append(listed, row[1])
	}
	if !slices.Equal(listed, rooms) {
		t.Errorf("CONTRIBUTING.md lists\n%s\nwant\n%s", strings.Join(listed, "\n"), strings.Join(rooms, "\n"))
	}
}

func TestFilesAreNoLongerThan500Lines(t *testing.T) {
	for _, name := range rooms {
		if n := strings.Count(readFile(t, name), "\n"); n > 500 {
			t.Errorf("%s has %d lines; a room that large is two", name, n)
		}
	}
}
